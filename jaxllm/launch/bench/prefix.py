"""`jaxllm bench prefix`: requests that begin alike."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from jaxllm.launch.bench.common import memory
from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Time to the first token of requests that share the beginning of their prompts, all there from the start, with prefix
    caching and without it. The cache is empty at the start of each run. The outputs must be the same.

    Example:

      jaxllm bench prefix --model demo --num-prompts 64 --prefix-len 1000 --json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    num_prompts: int = 64
    "Requests, all there from the start."
    prefix_len: int = 1000
    "Tokens that all prompts begin with."
    suffix_len: int = 16
    "Tokens after them, of each prompt its own."
    output_len: int = 16
    "Tokens generated for each, greedily, past any end of sequence."
    max_num_seqs: int | None = None
    "Requests that run at the same time; by default all."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    repeats: int = 3
    "Runs that count, after one that does not; figures are their medians."

    def __post_init__(self) -> None:
        self.check_counts("num_prompts", "prefix_len", "suffix_len", "output_len", "repeats")


def run(config: Config) -> dict[str, Any]:
    cached, tokens, result = _measure(config, enable_prefix_caching=True)
    plain, plain_tokens, _ = _measure(config, enable_prefix_caching=False)
    same = tokens == plain_tokens
    speedup = plain["ttft_ms"] / cached["ttft_ms"]
    print(
        f"first token after {cached['ttft_ms']:.0f} ms with prefix caching, {plain['ttft_ms']:.0f} ms without: {speedup:.1f} times "
        f"sooner; the outputs are {'the same' if same else 'NOT the same'}"
    )
    return {
        **cached,
        **{f"{name}_uncached": value for name, value in plain.items()},
        "ttft_speedup": round(speedup, 2),
        "outputs_identical": same,
        **result,
        "model": config.model,
        "num_prompts": config.num_prompts,
        "prefix_len": config.prefix_len,
        "suffix_len": config.suffix_len,
        "output_len": config.output_len,
    }


def _measure(config: Config, *, enable_prefix_caching: bool) -> tuple[dict[str, float], list[list[list[int]]], dict[str, int]]:
    """Median times in milliseconds and shares of the prompts found in the cache; each run's tokens; the engine's bytes and compiles."""
    import numpy as np

    from jaxllm import LLM, SamplingParams

    llm = LLM(
        config.model,
        dtype=config.dtype,
        max_model_len=config.prefix_len + config.suffix_len + config.output_len,
        max_num_seqs=config.max_num_seqs or config.num_prompts,
        max_num_batched_tokens=config.max_num_batched_tokens,
        skip_tokenizer_init=True,
        enable_prefix_caching=enable_prefix_caching,
    )
    llm.engine.runner.finish_warm_up()
    rng = np.random.default_rng(0)
    low, high = (100, 40_000) if llm.engine.vocab_size > 40_000 else (0, llm.engine.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=config.output_len, ignore_eos=True)
    runs, tokens = [], []
    for i in range(config.repeats + 1):
        prefix = rng.integers(low, high, config.prefix_len).tolist()
        prompts = [{"prompt_token_ids": prefix + rng.integers(low, high, config.suffix_len).tolist()} for _ in range(config.num_prompts)]
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        if i == 0:
            continue
        tokens.append([output.outputs[0].token_ids for output in outputs])
        ttft = 1e3 * median(o.metrics.first_token_time - o.metrics.arrival_time for o in outputs)
        share = sum(o.num_cached_tokens for o in outputs) / sum(len(o.prompt_token_ids) for o in outputs)
        runs.append({"ttft_ms": ttft, "seconds": seconds, "cached_share": share})
        print(f"caching {'on' if enable_prefix_caching else 'off'}, run {i}: first token after {ttft:.1f} ms", file=sys.stderr)
    counts = {"compiles_after_warmup": llm.engine.runner.stats.compiles_after_warmup, **memory(llm.engine)}
    return {name: round(median(run[name] for run in runs), 4) for name in runs[0]}, tokens, counts
