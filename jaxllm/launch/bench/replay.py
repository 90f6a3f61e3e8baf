"""`jaxllm bench replay`: a trace on the real engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm.simulation import Trace


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Serve a trace's requests (--trace), or drawn ones (--workload), with the engine in this process, as fast as they came or faster, once
    under each policy; the figures are those of `jaxllm simulate`, measured. Prompts are random tokens; outputs are as long as the
    trace says, which the scheduler does not know.

    With --machine, what the simulator says of the very same beside it. With --host-kv-bytes: how long pages took to host memory and back
    (`swap_s`), and how much of that is not hidden behind steps (`exposed_swap_s`). With --json: `policies`: name -> the figures of
    `simulate`, and `simulated` likewise.

    Example:

      jaxllm bench profile --model demo --out cpu.json
      jaxllm bench replay --model demo --workload sharegpt --num-requests 40 --scale 0.2 --rate 1 --policy fcfs,mlfq --machine cpu.json
      jaxllm bench replay --model demo --trace azure2023_conv.csv --num-requests 100 --scale 0.1 --speedup 4
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    trace: str | None = None
    "Requests: a .csv file as Azure publishes them, or .jsonl as Mooncake does."
    workload: str | None = None
    "Requests drawn at random: sharegpt or alpaca."
    num_requests: int = 100
    "How many of the trace, from its beginning; or how many to draw."
    scale: float = 1.0
    "Prompts and outputs are so many times as long as the trace says."
    rate: float | None = None
    "Requests a second; a trace's time is stretched or shrunk to that."
    speedup: float | None = None
    "In place of --rate: a trace's requests come so many times as fast."
    policy: str = "fcfs"
    "Policies to compare, by commas (docs/scheduling.md)."
    machine: str | None = None
    "A profile of this machine (`jaxllm bench profile`), FILE.json: simulate the same."
    max_num_seqs: int = 16
    "Sequences that run at the same time."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    max_model_len: int = 2048
    "Tokens of prompt and output together; longer requests are left out."
    num_pages: int | None = None
    "Pages of the KV cache; by default the engine's choice."
    host_kv_bytes: int = 0
    "Host memory for pages that are given up."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    seed: int = 0
    "Draws the requests."

    def __post_init__(self) -> None:
        if (self.trace is None) == (self.workload is None):
            raise ConfigError("give one of --trace and --workload: what to serve")
        if self.rate is not None and self.speedup is not None:
            raise ConfigError("rate and speedup both say how fast requests come: give one")
        if self.speedup is not None and self.workload is not None:
            raise ConfigError("speedup is of a trace's own rate: give rate with --workload")
        for name in ("num_requests", "scale", "rate", "speedup", "max_num_seqs", "max_model_len"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


def run(config: Config) -> dict[str, Any]:
    from jaxllm import LLM
    from jaxllm.simulation import cost_model, figures, simulate
    from jaxllm.simulation.real import serve

    trace, cost = _requests(config), None if config.machine is None else cost_model(config.machine)
    measured, simulated = {}, {}
    for name in (name.strip() for name in config.policy.split(",")):
        llm = LLM(
            config.model,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_pages=config.num_pages,
            host_kv_bytes=config.host_kv_bytes,
            scheduling_policy=name,
            skip_tokenizer_init=True,
            warmup_in_background=False,
        )
        engine = llm.engine
        engine.runner.profile()  # what is done once, such as a thread's first breath; policies learn nothing from it
        measured[name] = figures(serve(engine, trace))
        measured[name]["compiles_after_warmup"] = engine.runner.stats.compiles_after_warmup
        if cost is not None:
            swap = "reactive" if config.host_kv_bytes else "recompute"
            host = dict(swap=swap, host_bytes=config.host_kv_bytes or float("inf"))
            simulated[name] = figures(simulate(trace, cost, engine.limits, engine.pool.num_pages, **host))
        _print(name, measured[name], simulated.get(name))
        engine.close()
        del llm, engine
    described = {"requests": len(trace), "requests_per_s": trace.rate, "model": config.model}
    return {"policies": measured, **({"simulated": simulated} if simulated else {}), **described}


def _requests(config: Config) -> Trace:
    from jaxllm.simulation import Arrivals, draw_workload, read_trace

    if config.trace is not None:
        trace = read_trace(config.trace).first(config.num_requests).scaled(config.scale)
        trace, left_out = trace.fitting(config.max_model_len)
        if left_out:
            print(f"{left_out} requests of more than {config.max_model_len} tokens are left out", file=sys.stderr)
        if not len(trace):
            raise ConfigError(f"no request of {config.trace} fits in {config.max_model_len} tokens")
        rate = config.rate if config.rate is not None else trace.rate * (config.speedup or 1.0)
        return trace.at_rate(rate)
    longest = int(config.max_model_len / max(1.0, config.scale))
    arrivals = Arrivals(config.rate or 1.0)
    trace = draw_workload(config.workload, config.num_requests, arrivals, seed=config.seed, max_model_len=longest)
    return trace.scaled(config.scale).fitting(config.max_model_len)[0]


_COLUMNS = ("mean_ttft_s", "mean_jct_s", "p99_jct_s", "mean_normalized_latency_s", "output_tokens_per_s", "preemptions")


def _print(name: str, measured: dict[str, float], simulated: dict[str, float] | None) -> None:
    print(f"{name:12}" + "".join(f"{column.removesuffix('_s').replace('normalized_latency', 'norm'):>22}" for column in _COLUMNS))
    for label, figures in (("measured", measured), ("simulated", simulated)):
        if figures is not None:
            print(f"  {label:10}" + "".join(f"{figures[column]:22.4g}" for column in _COLUMNS))
    if measured["swap_s"]:
        moved = (measured["swapped_in_bytes"] + measured["swapped_out_bytes"]) / 1e6
        hidden = 1 - measured["exposed_swap_s"] / measured["swap_s"]
        print(f"  {moved:.0f} MB moved to host memory and back took {measured['swap_s']:.3f} s, of which {100 * hidden:.0f}% were hidden")
