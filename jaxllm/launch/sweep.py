"""`jaxllm sweep`: how much load each policy bears, in the simulator."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.pictures import check_picture, save_figure


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Serve a drawn workload at rising loads by several policies; print the normalized latency (JCT by output token) at each, and how
    many times fcfs's load each other one bears at equal latency: FastServe's comparison (arXiv 2305.05920, section 6).

    With --json: loads, saturation_requests_per_s, `curves` (label -> latencies), latencies_s, `load_by_fcfs` (label -> ratios; null where
    one of the two was not simulated at such a latency).

    Example:

      jaxllm sweep --workload sharegpt                            # fcfs, and mlfq as the paper has it: pages kept in host memory
      jaxllm sweep --workload alpaca --policy fcfs,mlfq+proactive,mlfq+reactive,mlfq --plot curves.svg
    """

    workload: str = "sharegpt"
    "Requests drawn at random: sharegpt or alpaca."
    policy: str = "fcfs,mlfq+proactive"
    "Policies, by commas; with +reactive or +proactive, pages of those who give up their places go to host memory. fcfs is among them."
    machine: str = "opt-13b/a100"
    "What to simulate: opt-13b/a100, llama-8b/h100, or a measured profile, FILE.json."
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 0.95, 1.05, 1.2, 1.5, 2.0, 2.5, 3.0)
    "In units of what fcfs serves at most."
    latencies_s: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
    "Normalized latencies at which loads are compared."
    num_requests: int = 500
    "Of each run."
    max_num_seqs: int = 16
    "Sequences that run at the same time."
    max_num_batched_tokens: int = 512
    "Tokens in one step."
    mlfq_starvation_s: float = 3.0
    "mlfq's alpha: 0.3 in the paper, 3 in its artifact."
    seed: int = 0
    "Draws the requests."
    plot: str | None = None
    "Draw the curves to this file (.png, .svg)."

    def __post_init__(self) -> None:
        check_picture(self.plot)
        if "fcfs" not in [name.strip() for name in self.policy.split(",")]:
            raise ConfigError("policy must have fcfs in it: the others are measured by it")
        for name in ("num_requests", "max_num_seqs", "max_num_batched_tokens", "mlfq_starvation_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("loads", "latencies_s"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"{name} must be numbers above 0, got {getattr(self, name)}")


def run(config: Config) -> dict[str, Any]:
    from jaxllm.simulation import Arrivals, cost_model, draw_workload
    from jaxllm.simulation.plots import curves
    from jaxllm.simulation.sweep import contender, gains, sweep

    cost = cost_model(config.machine)
    contenders = [contender(name.strip(), {"mlfq": {"starvation_s": config.mlfq_starvation_s}}) for name in config.policy.split(",")]
    trace = draw_workload(config.workload, config.num_requests, Arrivals(), seed=config.seed, max_model_len=cost.max_model_len)
    limits = dict(max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens, page_size=16)
    result = sweep(trace, cost, contenders, config.loads, **limits)
    loads = sorted(config.loads)
    lines = {label: result.curve(label) for label in result.figures}
    print(f"saturation: {result.saturation:.3g} requests/s\n{'normalized latency, s':24}" + "".join(f"{load:8.2f}" for load in loads))
    for label, values in lines.items():
        print(f"{label:24}" + "".join(f"{value:8.3f}" for value in values))
    found = gains(result, "fcfs", config.latencies_s)
    print(f"\n{'load by fcfs at, s':24}" + "".join(f"{latency:8.2f}" for latency in config.latencies_s))
    for label, ratios in found.items():
        print(f"{label:24}" + "".join("       -" if ratio is None else f"{ratio:8.2f}" for ratio in ratios))
    if config.plot is not None:
        title = f"{config.workload}, {config.max_num_seqs} at a time"
        print(f"wrote {save_figure(curves({title: (loads, lines)}), config.plot)}", file=sys.stderr)
    return {
        "loads": loads,
        "saturation_requests_per_s": result.saturation,
        "curves": lines,
        "latencies_s": list(config.latencies_s),
        "load_by_fcfs": found,
    }
