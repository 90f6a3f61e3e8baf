"""Write tests/goldens/sampling.npz: what vLLM does to logits before it draws, and what it and transformers leave to be drawn.

    VLLM_PYTHON tests/goldens/make_sampling_goldens.py

`requests` is JSON: for each row of `logits` [N, V] the parameters, prompt and outputs of a request; `processed` [N, V] are the logits
after vLLM's `Sampler.apply_logits_processors` (allowed tokens, bad words, min_tokens, logit_bias, penalties, in that order).
`filters` is JSON too: for each row of `wide` [M, W] temperature, min_p, top_k, top_p (0 or 1: off) and typical_p; `kept` [M, W] are the
probabilities that remain after vLLM's temperature, min_p, top_k and top_p, and then transformers' `TypicalLogitsWarper`.

`generations` is JSON: greedy continuations of the prompts of models/llama_gqa by transformers, whose logits vLLM's sampler has processed as
above at each step; `logprobs` are of the tokens, by the model's own logits.

Made with vLLM 0.32.0 (CPU), transformers 5.19.0, Python 3.11.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TypicalLogitsWarper
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinPLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.sample.sampler import Sampler

VOCAB, WIDE = 100, 300  # 100: its last word of 32 bits is not full
RNG = np.random.default_rng(0)

ALLOWED = sorted(RNG.choice(VOCAB, 40, replace=False).tolist())
# Parameters of vLLM's names, `bad` words as tokens, tokens that `stop`, how many `outputs` there are, and what they end with.
REQUESTS = [
    dict(),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6),
    dict(presence_penalty=1.5),
    dict(presence_penalty=-2.0),
    dict(frequency_penalty=0.8),
    dict(frequency_penalty=-0.3, outputs=0),
    dict(presence_penalty=0.4, frequency_penalty=0.9, repetition_penalty=1.2),
    dict(presence_penalty=0.4, frequency_penalty=0.9, repetition_penalty=1.2, outputs=0),
    dict(allowed_token_ids=ALLOWED),
    dict(allowed_token_ids=[0, 31, 32, 63, 64, 95, 96, 99]),
    dict(bad=[[7]]),
    dict(bad=[[7, 8, 9], [8, 9], [9], [5, 6], [8, 5]], ends=[7, 8]),
    dict(bad=[[7, 8, 9, 10, 11, 12, 13, 14]], ends=[7, 8, 9, 10, 11, 12, 13]),
    dict(bad=[[7, 8, 9, 10, 11, 12, 13, 14]], ends=[6, 8, 9, 10, 11, 12, 13]),
    dict(bad=[[7, 8, 9], [8, 9]], outputs=1, ends=[8], prompt_ends=[7]),  # a word that began in the prompt does not count
    dict(bad=[[7, 8]], outputs=0, prompt_ends=[7]),
    dict(logit_bias={0: 5.5, 41: -100.0, 99: 100.0}),
    dict(min_tokens=9, stop=[2, 3], outputs=8),
    dict(min_tokens=9, stop=[2, 3], outputs=9),
    dict(min_tokens=9, stop=[2, 3], outputs=8, logit_bias={2: 50.0, 4: 1.0}),
    dict(
        allowed_token_ids=ALLOWED,
        bad=[[ALLOWED[3]], [7, ALLOWED[5]]],
        logit_bias={ALLOWED[0]: -3.0, ALLOWED[1]: 7.0, 7: 2.0},
        min_tokens=30,
        stop=[ALLOWED[2]],
        presence_penalty=0.7,
        frequency_penalty=-0.2,
        repetition_penalty=1.3,
        ends=[7],
    ),
]
GENERATIONS = [
    dict(),
    dict(repetition_penalty=1.3),
    dict(presence_penalty=1.2),
    dict(frequency_penalty=0.7),
    dict(frequency_penalty=-0.5),
    dict(presence_penalty=-0.6, frequency_penalty=0.8, repetition_penalty=0.9),
    dict(allowed_token_ids=list(range(3, 128, 5))),
    dict(logit_bias={5: 3.0, 77: 2.0, 127: 2.5}),
    dict(min_tokens=12, stop=list(range(0, 128, 3))),
    dict(
        allowed_token_ids=list(range(60)),
        logit_bias={7: 2.0},
        min_tokens=9,
        stop=list(range(0, 30, 2)),
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
    ),
]
FILTERS = [dict(temperature=1.0, typical_p=p) for p in (0.05, 0.2, 0.5, 0.8, 0.95, 0.999)] + [
    dict(temperature=0.5, typical_p=0.6),
    dict(temperature=2.0, typical_p=0.6),
    dict(temperature=1.0, min_p=0.05, typical_p=0.7),
    dict(temperature=1.0, top_k=25, typical_p=0.7),
    dict(temperature=1.0, top_p=0.8, typical_p=0.7),
    dict(temperature=1.4, min_p=0.01, top_k=60, top_p=0.95, typical_p=0.85),
    dict(temperature=0.7, min_p=0.02, top_k=30, top_p=0.9, typical_p=1.0),
    dict(temperature=1.0, top_k=1, typical_p=0.5),
]


def tokens(count: int, ends: list[int]) -> list[int]:
    """Some that come more than once."""
    return (RNG.choice(40, count).tolist() + ends)[-count:] if count else []


def processed(requests: list[dict], logits: torch.Tensor) -> torch.Tensor:
    params = [
        SamplingParams(
            **{k: r[k] for k in ("logit_bias", "allowed_token_ids", "min_tokens") if k in r}, stop_token_ids=r.get("stop"), max_tokens=99
        )
        for r in requests
    ]
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(requests)))
    processors = [MinTokensLogitsProcessor(config, "cpu", False), LogitBiasLogitsProcessor(config, "cpu", False)]
    added = [(i, p, r["prompt"], r["output"]) for i, (p, r) in enumerate(zip(params, requests, strict=True))]
    for processor in processors:
        processor.update_state(BatchUpdate(batch_size=len(requests), removed=[], added=added, moved=[]))
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    for row, request in zip(forbidden, requests, strict=True):
        if "allowed_token_ids" in request:
            row[:] = True
            row[request["allowed_token_ids"]] = False
    longest = max(len(r["prompt"]) for r in requests)
    prompts = torch.tensor([r["prompt"] + [logits.shape[1]] * (longest - len(r["prompt"])) for r in requests])
    each = lambda name, default: torch.tensor([r.get(name, default) for r in requests], dtype=torch.float32)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=prompts,
        frequency_penalties=each("frequency_penalty", 0.0),
        presence_penalties=each("presence_penalty", 0.0),
        repetition_penalties=each("repetition_penalty", 1.0),
        output_token_ids=[r["output"] for r in requests],
        allowed_token_ids_mask=forbidden,
        bad_words_token_ids={i: r["bad"] for i, r in enumerate(requests) if "bad" in r},
        logitsprocs=LogitsProcessors(processors),
    )
    return Sampler().apply_logits_processors(logits.clone(), metadata, predict_bonus_token=False)


def kept(filters: dict, logits: torch.Tensor) -> torch.Tensor:
    """The probabilities [1, W] that are left of one row."""
    logits = logits / filters["temperature"]
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
    min_p = MinPLogitsProcessor(config, "cpu", False)
    added = [(0, SamplingParams(min_p=filters.get("min_p", 0.0)), [], [])]
    min_p.update_state(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
    logits = min_p.apply(logits.clone())
    k = torch.tensor([filters.get("top_k", 0) or logits.shape[1]])
    logits = apply_top_k_top_p_pytorch(logits, k, torch.tensor([filters.get("top_p", 1.0)]))
    if filters["typical_p"] < 1:
        logits = TypicalLogitsWarper(filters["typical_p"])(None, logits)
    return logits.softmax(-1)


@torch.no_grad()
def generated(request: dict, prompt: list[int], model: torch.nn.Module) -> dict:
    """32 greedy tokens, or up to the first that stops."""
    request = request | dict(prompt=prompt, output=[])
    logprobs = []
    while len(logprobs) < 32 and not (logprobs and request["output"][-1] in request.get("stop", ())):
        logits = model(torch.tensor([prompt + request["output"]])).logits[:, -1]
        best = processed([request], logits)[0].topk(2)
        assert best.values[0] - best.values[1] > 2e-3, "rounding could decide: change the parameters"
        token = int(best.indices[0])
        request["output"].append(token)
        logprobs.append(round(float(logits.log_softmax(-1)[0, token]), 5))
    return request | dict(logprobs=logprobs)


def main() -> None:
    folder = Path(__file__).parent / "models" / "llama_gqa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with np.load(folder / "golden.npz") as data:
        prompts = [data[f"prompt_{i}"].tolist() for i in range(3)]
        generations = [generated(request, prompts[i % 3], model) for i, request in enumerate(GENERATIONS)]
        assert generations[0]["output"] == data["greedy_0"].tolist()
    requests = []
    for request in REQUESTS:
        prompt = tokens(11, request.get("prompt_ends", []))
        output = tokens(request.get("outputs", 15), request.get("ends", []))
        told = {k: v for k, v in request.items() if k not in ("outputs", "ends", "prompt_ends")}
        requests.append(told | dict(prompt=prompt, output=output))
    logits = torch.tensor(RNG.normal(size=(len(requests), VOCAB)) * 3, dtype=torch.float32)
    wide = torch.tensor(RNG.normal(size=(len(FILTERS), WIDE)) * 2, dtype=torch.float32)
    np.savez_compressed(
        Path(__file__).parent / "sampling.npz",
        requests=json.dumps(requests),
        logits=logits.numpy(),
        processed=processed(requests, logits).numpy(),
        generations=json.dumps(generations),
        filters=json.dumps(FILTERS),
        wide=wide.numpy(),
        kept=torch.cat([kept(f, row[None]) for f, row in zip(FILTERS, wide, strict=True)]).numpy(),
    )


if __name__ == "__main__":
    main()
