"""With a seed, a request's tokens, and the bits of their log-probabilities, are the same alone, in any batch, chunked, preempted,
or over a cached prefix.

The model is random, with the widths of a real one: XLA's CPU backend chooses how to add by the sizes of things (with heads of
eight values, as the goldens have, it fuses otherwise), and it is its choices that are tested here.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints.writer import write_safetensors

CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    eos_token_id=0,
)
OPTIONS = dict(
    dtype="float32",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    page_size=16,
    max_model_len=256,
    skip_tokenizer_init=True,
    warmup=False,  # each step in the shape that is its own, compiled when it is needed
)
RNG = np.random.default_rng(0)
PROMPT = RNG.integers(1, CONFIG["vocab_size"], 41).tolist()
OTHERS = [RNG.integers(1, CONFIG["vocab_size"], n).tolist() for n in (3, 17, 90, 33, 64, 21, 50)]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=500, seed=7, max_tokens=24, ignore_eos=True, logprobs=3)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)


def write_model(folder, **changes):
    config = {**CONFIG, **changes}
    rng = np.random.default_rng(1)
    d, f, hd = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": s for n, s in dict(q=(q, d), k=(kv, d), v=(kv, d), o=(d, q)).items()}
        shapes |= {f"{layer}mlp.{n}_proj.weight": s for n, s in dict(gate=(f, d), up=(f, d), down=(d, f)).items()}
        shapes |= {f"{layer}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
    write_safetensors(folder, ((n, (rng.standard_normal(s) * 0.1).astype(np.float32)) for n, s in shapes.items()), config)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, **OPTIONS)


def told(output):
    """Tokens and log-probabilities, to the bit."""
    completion = output.outputs[0]
    return completion.token_ids, [{i: p.logprob for i, p in place.items()} for place in completion.logprobs]


def run(llm, params, prompt=PROMPT, others=()):
    prompts = [{"prompt_token_ids": p} for p in (*others, prompt)]
    each = [SamplingParams(temperature=1.0, seed=i, max_tokens=20 + i, ignore_eos=True) for i in range(len(others))]
    return told(llm.generate(prompts, [*each, params])[-1])


@pytest.mark.parametrize("params", [SEEDED, GREEDY], ids=["seeded", "greedy"])
def test_alone_in_any_batch_cached_and_preempted(llm, model, params):
    alone = run(llm, params)
    for n in range(1, 8):
        llm.reset_prefix_cache()
        assert run(llm, params, others=OTHERS[:n]) == alone, f"beside {n} others"
    assert run(llm, params) == alone, "over its own cached prefix"
    small = LLM(model, **{**OPTIONS, "max_num_batched_tokens": 16, "max_model_len": 112}, num_pages=8)
    assert run(small, params, others=OTHERS[:2]) == alone, "in chunks of 16, preempted"
    assert small.engine.scheduler.num_preemptions > 0
    conversation = PROMPT + alone[0]
    cached, fresh = (run(e, params, prompt=conversation) for e in (llm, LLM(model, **OPTIONS, enable_prefix_caching=False)))
    assert cached == fresh, "over pages that decoding filled"


def test_every_pair_of_buckets(llm, monkeypatch):
    """Prefill in one bucket and decoding in another: all pairs give the same bits."""
    engine = llm.engine
    outputs = {}
    for first, then in itertools.product((b for b in engine.runner.buckets if not b.decode), engine.runner.buckets):
        llm.reset_prefix_cache()
        monkeypatch.setattr(engine.scheduler, "config", dataclasses.replace(engine.limits, max_num_batched_tokens=first.tokens))
        monkeypatch.setattr("jaxllm.serving.runner.pick_bucket", lambda _, tokens, *__: first if tokens > 1 else then)  # noqa: B023
        outputs[first, then] = run(llm, SEEDED)
    assert len(outputs) == 2 * 4
    reference = outputs.popitem()[1]
    assert [pair for pair, output in outputs.items() if output != reference] == []
