"""Policies compared over workloads, batch sizes and loads, and how they measure up to what is asked of `adaptive`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.simulation.cost import CostModel
from jaxllm.simulation.load import saturation
from jaxllm.simulation.metrics import figures
from jaxllm.simulation.simulate import limits_of, simulate
from jaxllm.simulation.traces import Trace

DEPLOYED = ("fcfs", "hrrn", "mlfq")  # what others' engines have; priority is fcfs where all priorities are alike
ORACLE = "srpt"  # it is told how long outputs will be
# `adaptive`'s index with nothing to hold it back: near the least mean JCT that can be had without being told (Gittins's index is optimal
# for one server: Aalto et al., 2009), whatever becomes of the longest.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gittins": ("adaptive", {"most_s": 1e6, "reach": 1e3, "margin": 0.0, "seniority": 0.0, "shortness": 0.0}),
}
FIGURES = ("mean_jct_s", "p99_jct_s", "mean_normalized_latency_s")


@dataclass(frozen=True)
class Case:
    """One workload on one machine under one load, and each policy's figures: means over the seeds."""

    workload: str
    max_num_seqs: int
    load: float
    figures: dict[str, dict[str, float]]

    def ratio(self, policy: str, figure: str, to: str = "fcfs") -> float:
        """A policy's figure by another's, fcfs's by default."""
        return self.figures[policy][figure] / self.figures[to][figure]


def study(
    workloads: dict[str, tuple[Callable[[int], Trace], CostModel]],
    *,
    policies: Sequence[str],
    batch_sizes: Sequence[int],
    loads: Sequence[float],
    seeds: Sequence[int],
    max_num_batched_tokens: int,
    page_size: int,
    options: dict[str, dict[str, Any]] | None = None,
) -> Iterator[Case]:
    """Each case in turn. `workloads`: name -> (a trace from a seed, the machine that serves it); loads are in units of what fcfs
    serves of that trace at most (`saturation`)."""
    for workload, (draw, cost) in workloads.items():
        traces = [draw(seed) for seed in seeds]
        for batch in batch_sizes:
            limits = dict(max_num_seqs=batch, max_num_batched_tokens=max_num_batched_tokens, page_size=page_size)
            rates = [saturation(trace, cost, **limits) for trace in traces]
            for load in loads:
                found: dict[str, dict[str, float]] = {}
                for policy in policies:
                    name, constants = VARIANTS.get(policy, (policy, (options or {}).get(policy)))
                    settings = limits_of(cost, policy=name, options=constants, **limits)
                    runs = [
                        figures(simulate(trace.at_rate(load * rate), cost, *settings, tell_lengths=policy == ORACLE))
                        for trace, rate in zip(traces, rates, strict=True)
                    ]
                    found[policy] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
                yield Case(workload, batch, load, found)


def judge(case: Case, policy: str = "adaptive") -> dict[str, tuple[float, bool]]:
    """What is asked of a policy in a case: name -> (its figure by the other's, whether that is good enough).

    Its mean JCT is at most 2% above the best deployed policy's; at 95% of saturation and more, fcfs's is at least 1.3 times it; its P99
    JCT is at most 1.1 times fcfs's; at saturation, fcfs's normalized latency is at least 2 times it.
    """
    deployed = [p for p in DEPLOYED if p in case.figures]
    against_best = max(case.ratio(policy, "mean_jct_s", to=other) for other in deployed)
    p99 = case.ratio(policy, "p99_jct_s")
    result = {"jct_by_best": (against_best, against_best <= 1.02), "p99_jct_by_fcfs": (p99, p99 <= 1.1)}
    if case.load >= 0.95:
        jct = 1 / case.ratio(policy, "mean_jct_s")
        result["fcfs_jct_by_it"] = (jct, jct >= 1.3)
    if case.load >= 1.0:
        normalized = 1 / case.ratio(policy, "mean_normalized_latency_s")
        result["fcfs_normalized_by_it"] = (normalized, normalized >= 2)
    return result
