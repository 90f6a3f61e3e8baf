"""`jaxllm simulate`: run the scheduler without a device."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllm.config import unknown
from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.pictures import check_picture, save_figure


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Serve a trace with the real scheduler and a model of a machine in place of a device; or, with --replay, derive every plan of a
    recorded run again, and compare.

    The requests are a trace's (--trace) or drawn (--workload), and served once under each policy. With --json: `policies`: name ->
    mean_jct_s, p99_jct_s, mean_normalized_latency_s, p99_ttft_s and so on, in seconds, and what was simulated. With --replay: plans,
    calls, truncated (whether the record's last line was cut off); exit status 1 shows the first plan that differs.

    Example:

      jaxllm simulate --workload sharegpt --rate 0.9 --policy fcfs,mlfq,adaptive
      jaxllm simulate --trace azure2023_conv.csv --load 0.95 --machine llama-8b/h100 --max-num-seqs 64
      jaxllm generate --model demo --prompt "Hello" --record run.jsonl
      jaxllm simulate --replay run.jsonl
    """

    replay: str | None = None
    "The record, made with --record FILE."
    trace: str | None = None
    "Requests: a .csv file as Azure publishes them, or .jsonl as Mooncake does."
    workload: str | None = None
    "Requests drawn at random: sharegpt or alpaca."
    num_requests: int | None = None
    "How many of the trace, from its beginning; or how many to draw, by default 1000."
    rate: float | None = None
    "Requests a second: a trace's time is stretched to that. By default the trace's own, or 1."
    load: float | None = None
    "In place of --rate: in units of the rate at which fcfs serves the requests if all are there from the start."
    cv: float = 1.0
    "Coefficient of variation of the times between drawn requests; 1 is a Poisson process."
    burst_factor: float = 1.0
    "How many times as fast drawn requests come in bursts."
    machine: str = "opt-13b/a100"
    "What to simulate: opt-13b/a100, llama-8b/h100, or a measured profile, FILE.json."
    policy: str = "fcfs"
    "Policies to compare, by commas (docs/scheduling.md)."
    policy_options: dict[str, float] = field(default_factory=dict)
    "Constants of the policy, if there is one only."
    swap: str = "recompute"
    "What becomes of the pages of those who give up their places, or several to compare, by commas: recompute, reactive, proactive."
    host_bytes: float = float("inf")
    "Host memory for swapped pages."
    max_num_seqs: int = 64
    "Sequences that run at the same time."
    max_num_batched_tokens: int = 512
    "Tokens in one step."
    page_size: int = 16
    "Tokens in a page of the KV cache."
    kv_tokens: int | None = None
    "Tokens that the KV cache has room for, in place of the machine's."
    slo_ttft_s: float | None = None
    "For the goodput: a request's first token within so many seconds."
    slo_tpot_s: float | None = None
    "For the goodput: each further one within so many seconds, on average."
    seed: int = 0
    "Draws the requests."
    plot: str | None = None
    "Draw when each of the first requests waited and ran, under each policy, to this file (.png, .svg)."
    plot_requests: int = 30
    "How many of them."

    def __post_init__(self) -> None:
        check_picture(self.plot)
        if sum(source is not None for source in (self.replay, self.trace, self.workload)) != 1:
            raise ConfigError("give one of --trace, --workload and --replay: what to simulate")
        if self.rate is not None and self.load is not None:
            raise ConfigError("rate and load both say how fast requests come: give one")
        memory, limits = ("kv_tokens", "host_bytes"), ("max_num_seqs", "max_num_batched_tokens", "page_size")
        for name in ("num_requests", "rate", "load", "plot_requests", *memory, *limits):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.policy_options and "," in self.policy:
            raise ConfigError("policy_options are of one policy: give one")


def run(config: Config) -> dict[str, Any]:
    return _replay(config) if config.replay is not None else _simulate(config)


def _replay(config: Config) -> dict[str, Any]:
    from jaxllm.serving.replay import replay

    result = replay(config.replay)
    if result.truncated:
        print("the last line is cut off, as a crash leaves it: it is left out")
    print(f"{result.plans} plans, all identical")
    return {"plans": result.plans, "calls": result.calls, "truncated": result.truncated}


def _simulate(config: Config) -> dict[str, Any]:
    from jaxllm.simulation import Arrivals, Slo, cost_model, draw_workload, figures, limits_of, read_trace, simulate
    from jaxllm.simulation.load import saturation
    from jaxllm.simulation.plots import Timeline, gantt
    from jaxllm.simulation.tier import SWAPS

    cost = cost_model(config.machine)
    if config.kv_tokens is not None:
        cost = replace(cost, kv_tokens=config.kv_tokens, max_model_len=min(cost.max_model_len, config.kv_tokens))
    limits = dict(max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens, page_size=config.page_size)
    slo = Slo(config.slo_ttft_s, config.slo_tpot_s)
    names = [name.strip() for name in config.policy.split(",")]
    options = {name: int(value) if value.is_integer() else value for name, value in config.policy_options.items()}
    swaps = [swap.strip() for swap in config.swap.split(",")]
    for swap in swaps:
        if swap not in SWAPS:
            raise ConfigError(unknown(swap, list(SWAPS), noun="way to swap"))
    settings = {name: limits_of(cost, policy=name, options=options, **limits) for name in names}
    longest = min(cost.max_model_len, cost.kv_tokens // config.page_size * config.page_size)
    if config.trace is not None:
        trace, left_out = read_trace(config.trace).fitting(longest)
        if left_out:
            print(f"{left_out} requests of more than {longest} tokens are left out", file=sys.stderr)
        trace = trace.first(config.num_requests or len(trace))
        if not len(trace):
            raise ConfigError(f"no request of {config.trace} fits in {longest} tokens")
        rate = config.rate
    else:
        arrivals = Arrivals(config.rate or 1.0, config.cv, config.burst_factor)
        trace = draw_workload(config.workload, config.num_requests or 1000, arrivals, seed=config.seed, max_model_len=longest)
        rate = None  # it is drawn at the rate asked for
    if config.load is not None:
        rate = config.load * saturation(trace, cost, **limits)
    if rate is not None:
        trace = trace.at_rate(rate)
    policies, timelines = {}, {}
    for name, swap in itertools.product(names, swaps):
        start, label = time.perf_counter(), name if len(swaps) == 1 else f"{name}+{swap}"
        timeline = None if config.plot is None else timelines.setdefault(label, Timeline(min(config.plot_requests, len(trace))))
        outcome = simulate(trace, cost, *settings[name], swap=swap, host_bytes=config.host_bytes, watch=timeline)
        policies[label] = figures(outcome, slo)
        print(f"{label}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    _print_table(policies)
    if config.plot is not None:
        print(f"wrote {save_figure(gantt(timelines, trace.arrivals), config.plot)}", file=sys.stderr)
    described = {"requests": len(trace), "requests_per_s": trace.rate if len(trace) > 1 else None, "machine": config.machine, **limits}
    return {"policies": policies, **described}


_COLUMNS = (
    "mean_ttft_s",
    "p99_ttft_s",
    "mean_jct_s",
    "p99_jct_s",
    "mean_normalized_latency_s",
    "p99_itl_s",
    "preemptions",
    "exposed_swap_s",
)


def _print_table(policies: dict[str, dict[str, float]]) -> None:
    print(f"{'':22}" + "".join(f"{name.removesuffix('_s').replace('normalized_latency', 'norm'):>13}" for name in _COLUMNS))
    for name, figures in policies.items():
        print(f"{name:22}" + "".join(f"{figures[column]:13.4g}" for column in _COLUMNS))
