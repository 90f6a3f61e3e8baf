"""Policies compared over workloads, batch sizes and loads, and how they measure up to what is asked of `adaptive`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.simulation.runs import Requests, Results, Run

DEPLOYED = ("fcfs", "hrrn", "mlfq")  # what others' engines have; priority is fcfs where all priorities are alike
ORACLE = "srpt"  # it is told how long outputs will be
TOLD = (ORACLE, "aged")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # `adaptive`'s index with nothing to hold it back: near the least mean JCT that can be had without being told (Gittins's index is
    # optimal for one server: Aalto et al., 2009), whatever becomes of the longest.
    "gittins": ("adaptive", {"most_s": 1e6, "reach": 1e3, "margin": 0.0, "seniority": 0.0, "shortness": 0.0, "flatness": 1.0}),
    # Who is told, and lets nobody wait for ever.
    "aged": (ORACLE, {"ageing": 60.0}),
}
FIGURES = ("mean_jct_s", "p99_jct_s", "mean_normalized_latency_s")
LEAST = "least"  # no policy, but what none can do better than (`bounds.py`)


@dataclass(frozen=True)
class Case:
    """One workload on one machine under one load, and each policy's figures: means over the seeds. `least_jct_s`: no policy at all
    has a lower mean JCT (`bounds.least_jct`)."""

    workload: str
    max_num_seqs: int
    load: float
    figures: dict[str, dict[str, float]]
    least_jct_s: float | None = None

    def ratio(self, policy: str, figure: str, to: str = "fcfs") -> float:
        """A policy's figure by another's, fcfs's by default."""
        return self.figures[policy][figure] / self.figures[to][figure]

    @property
    def least(self) -> float:
        """The least mean JCT that any policy could have, by fcfs's."""
        return self.least_jct_s / self.figures["fcfs"]["mean_jct_s"]


def study(
    requests: Sequence[Requests],
    results: Results,
    *,
    policies: Sequence[str],
    batch_sizes: Sequence[int],
    loads: Sequence[float],
    seeds: Sequence[int],
    max_num_batched_tokens: int,
    page_size: int,
    options: dict[str, dict[str, Any]] | None = None,
    done: Callable[[Run], None] = lambda run: None,
) -> Iterator[Case]:
    """Each case; loads are in units of what fcfs serves of the requests at most (`saturation`). `done`: called for each run made."""
    options = options or {}
    alone = {
        (kind, batch, seed): Run(kind, seed, batch, max_num_batched_tokens, page_size)
        for kind in requests
        for batch in batch_sizes
        for seed in seeds
    }
    most = results.of(alone.values(), done)
    runs = {
        ((kind, batch), seed, load, policy): _run(run, load * most[run]["saturation"], policy, options)
        for (kind, batch, seed), run in alone.items()
        for load in loads
        for policy in (*policies, LEAST)
    }
    found = results.of(runs.values(), done)
    for kind in requests:
        for batch in batch_sizes:
            for load in loads:
                rows = {p: [found[runs[(kind, batch), seed, load, p]] for seed in seeds] for p in (*policies, LEAST)}
                means = {p: {key: float(np.mean([row[key] for row in of])) for key in of[0]} for p, of in rows.items()}
                least = means.pop(LEAST)["mean_jct_s"]
                yield Case(kind.label, batch, load, means, least)


def _run(alone: Run, rate: float, policy: str, options: dict[str, dict[str, Any]]) -> Run:
    if policy == LEAST:
        return replace(alone, rate=rate)
    name, constants = VARIANTS.get(policy, (policy, options.get(policy, {})))
    return replace(alone, rate=rate, policy=name, options=tuple(constants.items()), tell_lengths=policy in TOLD)


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


def markdown(cases: Sequence[Case]) -> str:
    """A table, a row for each case: mean JCT, P99 JCT and normalized latency of each policy by fcfs's; in bold what `judge` asks of
    `adaptive` and is met."""
    policies = [name for name in cases[0].figures if name != "fcfs"]
    lines = ["| | at a time | load | " + " | ".join(f"`{name}`" for name in policies) + " | least JCT |"]
    lines.append("|---|---|---|" + "---|" * len(policies) + "---|")
    for case in cases:
        cells = []
        for name in policies:
            met = {key for key, (_, good) in judge(case, name).items() if good} if name == "adaptive" else set()
            asked = judge(case, name).keys()
            jct = {"jct_by_best", "fcfs_jct_by_it"} & asked
            values = [f"{case.ratio(name, figure):.2f}" for figure in FIGURES]
            good = [jct <= met, "p99_jct_by_fcfs" in met, "fcfs_normalized_by_it" in met]
            cells.append(" ".join(f"**{v}**" if bold and met else v for v, bold in zip(values, good, strict=True)))
        lines.append(f"| {case.workload} | {case.max_num_seqs} | {100 * case.load:.0f}% | " + " | ".join(cells) + f" | {case.least:.2f} |")
    return "\n".join(lines) + "\n"
