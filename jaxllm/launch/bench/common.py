"""What the benches share: random prompts of one length, one engine, the figures of a run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm import LLM, RequestOutput
    from jaxllm.serving.engine import Engine, EngineStats


@dataclass(frozen=True, kw_only=True)
class BenchCommand(Command):
    """Flags of the benches: how much work, and how often."""

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    num_prompts: int = 32
    "Requests, all there from the start."
    input_len: int = 128
    "Tokens of each prompt, drawn at random."
    output_len: int = 128
    "Tokens generated for each, greedily, past any end of sequence."
    max_num_seqs: int | None = None
    "Requests that run at the same time; by default all."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    tensor_parallel_size: int = 1
    "Devices to split the model over."
    record: str | None = None
    "Write all that the scheduler is told and plans to this file, for `jaxllm simulate --replay`; it costs some speed."
    repeats: int = 5
    "Runs that count, after one that does not; figures are their medians."

    def __post_init__(self) -> None:
        self.check_counts("num_prompts", "input_len", "output_len", "repeats", "tensor_parallel_size")


def make_llm(config: BenchCommand) -> tuple[LLM, float]:
    """An engine with every program compiled, and the seconds until it was ready (`EngineConfig.warmup_in_background`)."""
    start = time.perf_counter()
    from jaxllm import LLM

    llm = LLM(
        config.model,
        dtype=config.dtype,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=config.input_len + config.output_len,
        max_num_seqs=config.max_num_seqs or config.num_prompts,
        max_num_batched_tokens=config.max_num_batched_tokens,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        record=config.record,
    )
    startup = time.perf_counter() - start
    print(f"ready after {startup:.1f} s", file=sys.stderr)
    llm.engine.runner.finish_warm_up()
    return llm, startup


def measure(llm: LLM, config: BenchCommand, startup_s: float) -> dict[str, Any]:
    """Runs the work `repeats` times, and returns the median of each figure."""
    import numpy as np

    from jaxllm import SamplingParams

    rng = np.random.default_rng(0)
    low, high = (100, 40_000) if llm.engine.vocab_size > 40_000 else (0, llm.engine.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=config.output_len, ignore_eos=True)
    stats, compiled = llm.engine.stats, llm.engine.runner.stats
    runs = []
    for i in range(config.repeats + 1):
        prompts = [{"prompt_token_ids": rng.integers(low, high, config.input_len).tolist()} for _ in range(config.num_prompts)]
        before, start = replace(stats), time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        if i == 0:
            continue
        runs.append(_figures(outputs, config, seconds) | per_step(before, stats, seconds))
        print(f"run {i}: {runs[-1]['output_tokens_per_s']:.1f} output tokens/s in {seconds:.2f} s", file=sys.stderr)
    result: dict[str, Any] = {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
    return result | {
        "startup_s": round(startup_s, 2),
        "compiles": compiled.compiles,
        "compiles_after_warmup": compiled.compiles_after_warmup,
        **memory(llm.engine),
        "model": config.model,
        "num_prompts": config.num_prompts,
        "input_len": config.input_len,
        "output_len": config.output_len,
    }


def per_step(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, float]:
    """Of the steps between two moments: means, and the share of the KV cache's pages in use that held no token."""
    steps = max(1, after.steps - before.steps)
    return {
        "host_ms_per_step": 1e3 * (after.host_s - before.host_s) / steps,
        "ms_per_step": 1e3 * seconds / steps,
        "kv_waste": (after.kv_empty - before.kv_empty) / max(1, after.kv_places - before.kv_places),
    }


def peak_rss_bytes() -> int:
    """The most that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(engine: Engine) -> dict[str, int]:
    """Bytes: this process's most so far, and of it, if the device is the CPU, the weights and the page pool."""
    import jax

    held = lambda tree: sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "weights_bytes": held(engine.runner.model.params),
        "kv_cache_bytes": held(engine.runner.state.kv_pages),
    }


def _figures(outputs: list[RequestOutput], config: BenchCommand, seconds: float) -> dict[str, float]:
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    ttft = [o.metrics.first_token_time - o.metrics.arrival_time for o in outputs]
    tpot = [(o.metrics.finished_time - o.metrics.first_token_time) / max(1, config.output_len - 1) for o in outputs]
    return {
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds,
        "total_tokens_per_s": (tokens + config.num_prompts * config.input_len) / seconds,
        "ttft_ms": 1e3 * median(ttft),
        "tpot_ms": 1e3 * median(tpot),
    }
