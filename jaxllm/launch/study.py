"""`jaxllm study`: policies compared in the simulator."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.pictures import check_picture, save_figure


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Serve workloads and traces under each policy, at several batch sizes and loads, in the simulator; print each policy's figures by
    fcfs's, and whether `adaptive` is as good as it should be (docs/scheduling.md).

    With --json: `cases`, each with workload, max_num_seqs, load, `policies` (name -> figures, means over the seeds), `judged`; and how
    many of the cases met each demand.

    Example:

      jaxllm study --num-requests 500 --seeds 2 --batch-sizes 16
      jaxllm study --trace azure2023_conv.csv --trace mooncake_conversation.jsonl
    """

    workload: tuple[str, ...] = ("sharegpt", "alpaca")
    "Requests drawn at random, on opt-13b/a100."
    trace: tuple[str, ...] = ()
    "Files of requests, on llama-8b/h100; each seed takes another stretch of it."
    policy: str = "fcfs,hrrn,mlfq,adaptive,gittins,srpt"
    "Policies, by commas; fcfs is among them. gittins is what adaptive would be if the longest did not matter; srpt is told the lengths."
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    "Sequences that run at the same time."
    loads: tuple[float, ...] = (0.7, 0.95, 1.1)
    "In units of what fcfs serves at most."
    seeds: int = 5
    "Runs of each, with other requests."
    num_requests: int = 1000
    "Of each run."
    mlfq_starvation_s: float = 30.0
    "mlfq's alpha; with the 3 s of FastServe's artifact it does little but recompute under load."
    processes: int = 1
    "That runs are made in."
    keep: str | None = None
    "Keep the result of each run in this file (.jsonl), and take from it what it has: a study that was broken off goes on."
    table: str | None = None
    "Write the figures, by fcfs's, as a table in Markdown to this file (.md)."
    plot: str | None = None
    "Draw normalized latency against load, a panel for each workload and batch size, to this file (.png, .svg)."

    def __post_init__(self) -> None:
        check_picture(self.plot)
        if "fcfs" not in self.policy.split(","):
            raise ConfigError("policy must have fcfs in it: the others are measured by it")
        for name, ending in (("keep", ".jsonl"), ("table", ".md")):
            path = getattr(self, name)
            if path is not None and not (path.endswith(ending) and Path(path).absolute().parent.is_dir()):
                raise ConfigError(f"{name} must be a {ending} file in a folder that is there, got {path}")
        for name in ("seeds", "num_requests", "mlfq_starvation_s", "processes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("batch_sizes", "loads"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ConfigError(f"{name} must be numbers above 0, got {getattr(self, name)}")


def run(config: Config) -> dict[str, Any]:
    from jaxllm.simulation.plots import curves
    from jaxllm.simulation.runs import Requests, results
    from jaxllm.simulation.study import ORACLE, judge, markdown, study
    from jaxllm.simulation.sweep import LATENCY

    policies = [name.strip() for name in config.policy.split(",")]
    requests = [Requests(name, "opt-13b/a100", config.num_requests) for name in config.workload]
    requests += [Requests(path, "llama-8b/h100", config.num_requests) for path in config.trace]
    for kind in requests:
        kind.check(config.seeds)
    mlfq = {"mlfq": {"starvation_s": config.mlfq_starvation_s}}
    settings = dict(max_num_batched_tokens=512, page_size=16, options=mlfq, seeds=range(config.seeds))
    settings |= dict(policies=policies, batch_sizes=config.batch_sizes, loads=config.loads)
    with results(config.processes, config.keep) as made:
        cases = list(study(requests, made, **settings, done=_progress()))
    rows, met, panels = [], {}, {}
    for case in cases:
        print(f"{case.workload}, {case.max_num_seqs} at a time, {100 * case.load:.0f}% of saturation; by fcfs:")
        for name in policies:
            ratios = [case.ratio(name, figure) for figure in ("mean_jct_s", "p99_jct_s", "mean_normalized_latency_s", "p99_ttft_s")]
            print(f"  {name:10} JCT {ratios[0]:6.3f}  P99 JCT {ratios[1]:6.3f}  normalized {ratios[2]:6.3f}  P99 TTFT {ratios[3]:6.3f}")
        print(f"  {'at least':10} JCT {case.least:6.3f}")
        loads, lines = panels.setdefault(f"{case.workload}, {case.max_num_seqs} at a time", ([], {}))
        loads.append(case.load)
        for name in policies:
            lines.setdefault(name, []).append(case.figures[name][LATENCY])
        judged = judge(case) if "adaptive" in policies else {}
        if judged and ORACLE in policies:
            print(f"  adaptive: mean JCT {case.ratio('adaptive', 'mean_jct_s', to=ORACLE):.3f} times that of {ORACLE}")
        for name, (value, good) in judged.items():
            counts = met.setdefault(name, [0, 0])
            counts[0] += good
            counts[1] += 1
            print(f"  adaptive: {name} {value:.3f}{'' if good else ', which is not good enough'}")
        described = {"workload": case.workload, "max_num_seqs": case.max_num_seqs, "load": case.load, "policies": case.figures}
        described |= {"least_jct_s": case.least_jct_s, "judged": {name: {"value": v, "met": good} for name, (v, good) in judged.items()}}
        rows.append(described)
    if config.table is not None:
        Path(config.table).write_text(markdown(cases), encoding="utf-8")
        print(f"wrote {config.table}", file=sys.stderr)
    if config.plot is not None:
        print(f"wrote {save_figure(curves(panels), config.plot)}", file=sys.stderr)
    for name, (good, of) in met.items():
        print(f"adaptive: {name} met in {good} of {of}")
    return {"cases": rows, "met": {name: {"met": good, "of": of} for name, (good, of) in met.items()}}


def _progress():
    """Tells on stderr how many runs have been made, now and then."""
    made = itertools.count(1)

    def done(run) -> None:
        if (n := next(made)) % 50 == 0:
            print(f"{n} runs made", file=sys.stderr)

    return done
