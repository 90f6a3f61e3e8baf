"""`jaxllm bench profile`: what this machine takes for a step, for the simulator."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Measure how long each shape of a step takes, what the tokens that it attends to add, and how fast pages move to host memory: a cost
    model, which `jaxllm simulate --machine FILE.json` and `jaxllm bench replay --machine FILE.json` read.

    With --json: the fields of the cost model (`simulation/cost.py`), `steps` (how many were measured) and `off` (the median of how
    far a step is from what the model says, as a share).

    Example:

      jaxllm bench profile --model demo --max-num-seqs 16 --out cpu.json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    out: str | None = None
    "Write the cost model to this file (.json)."
    max_num_seqs: int = 16
    "Sequences that run at the same time, as in what is to be simulated."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    max_model_len: int = 2048
    "Tokens of prompt and output together."
    num_pages: int | None = None
    "Pages of the KV cache; by default the engine's choice."
    longest: int = 1024
    "Tokens of the longest prompt that is measured."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    repeats: int = 2
    "Times that the load is run, after once that does not count."

    def __post_init__(self) -> None:
        self.check_counts("max_num_seqs", "max_model_len", "longest", "repeats")
        if self.longest + 32 > self.max_model_len:
            raise ConfigError(f"longest={self.longest} and 32 tokens more do not fit in max_model_len={self.max_model_len}")
        if self.out is not None and not (self.out.endswith(".json") and Path(self.out).absolute().parent.is_dir()):
            raise ConfigError(f"out must be a .json file in a folder that is there, got {self.out}")


def run(config: Config) -> dict[str, Any]:
    from jaxllm import LLM
    from jaxllm.simulation import CostModel
    from jaxllm.simulation.profile import fit, measure

    llm = LLM(
        config.model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_pages=config.num_pages,
        skip_tokenizer_init=True,
        warmup_in_background=False,
        host_kv_bytes=_HOST_BYTES,
    )
    engine = llm.engine
    steps = measure(engine, repeats=config.repeats, longest=config.longest)
    size, page_bytes = engine.limits.page_size, engine.runner.host_pages.page_bytes
    found = fit(steps)
    shapes = found["shapes"]
    times = {kind: {int(n.split()[1]): t for n, t in shapes.items() if n.startswith(kind)} for kind in ("decode", "mixed")}
    widest = max(times["mixed"])
    cost = CostModel(
        step_s=times["decode"][min(times["decode"])],
        token_s=times["mixed"][widest] / widest,
        kv_tokens=engine.pool.capacity * size,
        kv_token_bytes=page_bytes // size,
        host_bandwidth=_host_bandwidth(engine),
        max_model_len=engine.limits.max_model_len,
        **found,
    )
    off = sorted(abs(_predicted(cost, step) / step.seconds - 1) for step in steps)
    counts = Counter(step.shape for step in steps)
    for kind in times:
        for n, seconds in sorted(times[kind].items()):
            print(f"{kind} {n:5}: {1e3 * seconds:8.2f} ms ({counts[f'{kind} {n}']} steps)")
    print(f"half of {len(steps)} steps are within {100 * off[len(off) // 2]:.0f}% of that")
    result = dataclasses.asdict(cost)
    if config.out is not None:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {config.out}", file=sys.stderr)
    return result | {"steps": len(steps), "off": off[len(off) // 2]}


_HOST_BYTES = 64 << 20


def _predicted(cost, step) -> float:
    return cost.shapes[step.shape] + step.context * cost.context_token_s + step.pairs * cost.attend_pair_s


def _host_bandwidth(engine: Engine) -> float:
    """Bytes a second to host memory and back, in turn."""
    import jax

    runner, store = engine.runner, engine.runner.host_pages
    n = min(engine.pool.capacity, engine.pool.host_pages, 4 * store.sizes[-1])
    there, back = [(i + 1, i) for i in range(n)], [(i, i + 1) for i in range(n)]
    program = lambda kind, size: runner._program((kind, size))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        runner.state.kv_pages = store.move(program, runner.state.kv_pages, there, [])
        runner.state.kv_pages = store.move(program, runner.state.kv_pages, [], back)
        jax.block_until_ready(runner.state.kv_pages)
        best = min(best, time.perf_counter() - start)
    return 2 * n * store.page_bytes / best
