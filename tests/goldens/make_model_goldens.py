"""Write tests/goldens/models/: tiny random checkpoints and what transformers computes with them.

    HF_PYTHON tests/goldens/make_model_goldens.py [CASE ...] [--out FOLDER]

HF_PYTHON is a Python with torch and transformers 5 (the project itself depends on neither). For each case of `model_cases.py` this
draws weights large enough that every peculiarity shows, saves them with `save_pretrained`, loads them back (float32, eager attention,
CPU) and records in golden.npz, for prompts of 5, 21 and 40 tokens (suffix _0, _1, _2), each run alone in a freshly loaded model:

    prompt_i   int32 [T]
    logits_i   float32 [T, V]: one forward pass over the prompt, no cache before it
    greedy_i   int32 [32]: argmax continuation, end-of-sequence ignored: the prompt in one `model(...)` call, then one token a call with
               the same DynamicCache. Never `generate`, which for Phi-3 longrope throws the cache away when the length crosses
               original_max_position_embeddings.
    recomputed_greedy_i   only where rotary frequencies depend on the length ("dynamic", "longrope"): the continuation when the whole
               sequence is fed again, without a cache, at every step. Elsewhere it equals greedy_i, which is asserted.
    margin     float32: the smallest gap between the best and the second logit over all those steps

Seeds are tried in order until margin and variety suffice, so a run is reproducible. Asserted on the way: switching off any ablation
of the case, or any bias or norm weight, changes the logits; config.old.json gives bit-identical logits.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from model_cases import CASES, Case
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

PROMPT_LENGTHS = (5, 21, 40)
NEW_TOKENS = 32
MIN_MARGIN, MIN_DISTINCT, MAX_SEEDS = 2e-3, 6, 200
MIN_CHANGE = 1e-3  # smallest change of a logit that counts as visible; only gelu against gelu_new (2e-3) is near it


def auto_class(case: Case) -> type:
    return AutoModelForImageTextToText if case.model_type == "gemma3" else AutoModelForCausalLM


def load(case: Case, folder: Path, overrides: dict | None = None) -> torch.nn.Module:
    """The checkpoint in float32 with eager attention, its config.json changed by `overrides`."""
    entries = json.loads((folder / "config.json").read_text()) | (overrides or {})
    config = AutoConfig.for_model(**entries)
    return auto_class(case).from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()


def draw_weights(case: Case, model: torch.nn.Module) -> None:
    """Replace the default initialisation (std 0.02: uniform attention) by one where everything matters."""
    gemma = case.model_type.startswith("gemma")
    tied = model.config.get_text_config().tie_word_embeddings
    embedding_std = 0.2 if gemma else 0.5 if tied else 1.0  # gemma scales embeddings by sqrt(hidden); tied logits have std * sqrt(32)
    for name, weight in model.named_parameters():
        last = name.split(".")[-2]
        if name.endswith("bias"):
            mean, std = 0.0, 0.3
        elif weight.ndim == 1:
            # gemma's norms multiply by 1 + weight; large ones after the blocks keep a tied head from repeating the last token
            mean, std = (1.0 if last.startswith("post_") else 0.0) if gemma else 1.0, 0.3
        elif last in ("embed_tokens", "wte"):
            mean, std = 0.0, embedding_std
        elif last in ("embed_positions", "wpe"):
            mean, std = 0.0, 1.0
        elif last == "lm_head":
            mean, std = 0.0, 2 / weight.shape[1] ** 0.5
        else:
            fan_in = weight.shape[0] if case.model_type == "gpt2" else weight[0].numel()
            mean, std = 0.0, 1.5 / fan_in**0.5
        weight.data.normal_(mean, std)


def make_checkpoint(case: Case, folder: Path, seed: int) -> None:
    """Save a random checkpoint (config.json and safetensors, sharded if the case asks for it) into an empty `folder`."""
    torch.manual_seed(seed)
    model = auto_class(case).from_config(AutoConfig.for_model(case.model_type, **case.full_config()))
    draw_weights(case, model)
    model.to(getattr(torch, case.dtype)).save_pretrained(folder, **({"max_shard_size": case.shard} if case.shard else {}))


def prompts(case: Case, seed: int) -> list[list[int]]:
    generator = np.random.default_rng([seed, *case.name.encode()])
    return [generator.integers(3, 120, size=n).tolist() for n in PROMPT_LENGTHS]  # below any special token of the cases


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], cached: bool) -> tuple[np.ndarray, list[int], float]:
    """(prompt logits [T, V], 32 tokens, smallest gap), with one cache throughout or with none at all."""
    cache = DynamicCache(config=model.config.get_text_config()) if cached else None
    tokens, margin, prompt_logits, feed = list(prompt), float("inf"), None, list(prompt)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=cached).logits[0]
        prompt_logits = logits.numpy() if prompt_logits is None else prompt_logits
        best, second = torch.topk(logits[-1], 2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(logits[-1].argmax()))
        feed = tokens[-1:] if cached else tokens
    return prompt_logits, tokens[len(prompt) :], margin


def record(case: Case, folder: Path, seed: int) -> dict[str, np.ndarray] | None:
    """The contents of golden.npz, or None if this seed is too close to a tie or too repetitive."""
    golden, margin = {}, float("inf")
    for i, prompt in enumerate(prompts(case, seed)):
        # A fresh model for every prompt: dynamic NTK keeps the frequencies of the longest sequence it has seen.
        logits, tokens, gap = greedy(load(case, folder), prompt, cached=True)
        golden |= {f"prompt_{i}": np.array(prompt, np.int32), f"logits_{i}": logits, f"greedy_{i}": np.array(tokens, np.int32)}
        margin = min(margin, gap)
        if margin < MIN_MARGIN or len(set(tokens)) < MIN_DISTINCT:
            return None
        _, recomputed, gap = greedy(load(case, folder), prompt, cached=False)
        margin = min(margin, gap)
        if case.stateful_rope:
            golden[f"recomputed_greedy_{i}"] = np.array(recomputed, np.int32)
        else:
            assert recomputed == tokens, f"{case.name}: decoding with and without a cache disagree on prompt {i}"
    return None if margin < MIN_MARGIN else golden | {"margin": np.array(margin, np.float32)}


@torch.no_grad()
def run(model: torch.nn.Module, prompt: np.ndarray) -> np.ndarray:
    return model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0].numpy()


def check_sensitivity(case: Case, folder: Path, golden: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest change of a logit when a peculiarity is dropped, for the 40-token prompt; raises if one would go unnoticed."""
    prompt, expected = golden["prompt_2"], golden["logits_2"]
    changes = {}
    for name, overrides in case.ablations.items():
        changes[name] = float(np.abs(run(load(case, folder, overrides), prompt) - expected).max())
        assert changes[name] > MIN_CHANGE, f"{case.name}: dropping '{name}' changes the logits by only {changes[name]:.1e}"
    model = load(case, folder)
    for name, weight in model.named_parameters():
        if weight.ndim != 1 or "vision" in name or "multi_modal" in name or invisible(case, name):
            continue
        kept = weight.data.clone()
        weight.data.fill_(0.0 if name.endswith("bias") or case.model_type.startswith("gemma") else 1.0)
        change = float(np.abs(run(model, prompt) - expected).max())
        assert change > MIN_CHANGE, f"{case.name}: dropping {name} changes the logits by only {change:.1e}"
        changes["biases and norms, the least visible"] = min(change, changes.get("biases and norms, the least visible", change))
        weight.data.copy_(kept)
    return {name: round(change, 4) for name, change in changes.items()}


def invisible(case: Case, name: str) -> bool:
    """Without rotation a key bias adds the same number to every score of a query, and softmax removes it."""
    return case.model_type == "opt" and name.endswith("k_proj.bias")


def write_old_config(case: Case, folder: Path, golden: dict[str, np.ndarray]) -> None:
    """config.old.json as hub checkpoints spell it; asserts that it means the same model."""
    entries = json.loads((folder / "config.json").read_text())
    entries = {k: v for k, v in entries.items() if k not in case.old_remove} | case.old_add
    (folder / "config.old.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    with tempfile.TemporaryDirectory() as other:
        shutil.copy(folder / "model.safetensors", other)
        shutil.copy(folder / "config.old.json", Path(other) / "config.json")
        model = auto_class(case).from_pretrained(other, dtype=torch.float32, attn_implementation="eager").eval()
        for i in range(len(PROMPT_LENGTHS)):
            assert np.array_equal(run(model, golden[f"prompt_{i}"]), golden[f"logits_{i}"]), f"{case.name}: config.old.json differs"


def make_case(case: Case, folder: Path) -> dict:
    """Write one case; returns its entry of index.json."""
    for seed in range(MAX_SEEDS):
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(case, folder, seed)
        golden = record(case, folder, seed)
        if golden is not None:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed below {MAX_SEEDS} gives a margin of {MIN_MARGIN} and {MIN_DISTINCT} distinct tokens")
    np.savez_compressed(folder / "golden.npz", **golden)
    changes = check_sensitivity(case, folder, golden)
    if case.old_add is not None:
        write_old_config(case, folder, golden)
    shards = len(list(folder.glob("*.safetensors")))
    assert shards >= 3 if case.shard else shards == 1, f"{case.name}: {shards} shards"
    entry = {"model_type": case.model_type, "about": case.about, "seed": seed, "margin": round(float(golden["margin"]), 5)}
    return entry | {"old_config": case.old_add is not None, "logit_change_when_dropped": changes}


def main() -> None:
    parser = argparse.ArgumentParser(description="write the golden model checkpoints")
    parser.add_argument("cases", nargs="*", help="names of cases; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of index.json and models/")
    args = parser.parse_args()
    if unknown := set(args.cases) - {case.name for case in CASES}:
        parser.error(f"unknown cases: {sorted(unknown)}")
    torch.set_num_threads(1)  # the models are tiny; also keeps the order of sums fixed
    index_file = args.out / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    for case in CASES:
        if not args.cases or case.name in args.cases:
            index[case.name] = make_case(case, args.out / "models" / case.name)
            index_file.write_text(json.dumps(index, indent=2) + "\n")
            print(case.name, json.dumps(index[case.name]), flush=True)


if __name__ == "__main__":
    main()
