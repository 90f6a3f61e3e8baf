"""Latency against load, and the load that each policy bears at equal latency: the comparison of FastServe's figures 7 to 9 (Wu et al.,
arXiv 2305.05920)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import unknown
from jaxllm.errors import ConfigError
from jaxllm.simulation.cost import CostModel
from jaxllm.simulation.load import saturation
from jaxllm.simulation.metrics import figures
from jaxllm.simulation.simulate import limits_of, simulate
from jaxllm.simulation.tier import SWAPS, Swap
from jaxllm.simulation.traces import Trace

LATENCY = "mean_normalized_latency_s"


@dataclass(frozen=True)
class Contender:
    """A policy with its constants and what becomes of the pages of those who give up their places."""

    policy: str
    swap: Swap = "recompute"
    options: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return self.policy if self.swap == "recompute" else f"{self.policy}+{self.swap}"


def contender(label: str, options: dict[str, dict[str, Any]]) -> Contender:
    """Of `policy` or `policy+swap`; `options`: constants by policy. Raises ConfigError."""
    policy, _, swap = label.partition("+")
    if swap and swap not in SWAPS:
        raise ConfigError(unknown(swap, list(SWAPS), noun="way to swap"))
    return Contender(policy, swap or "recompute", options.get(policy))


@dataclass(frozen=True)
class Sweep:
    """`rates`: requests a second, rising; `figures`: label -> the figures at each (`metrics.figures`)."""

    saturation: float
    rates: tuple[float, ...]
    figures: dict[str, list[dict[str, float]]]

    def curve(self, label: str, figure: str = LATENCY) -> list[float]:
        return [found[figure] for found in self.figures[label]]

    def rate_at(self, label: str, latency: float) -> float | None:
        """Requests a second at which the normalized latency reaches that: between those that were simulated; None outside of them."""
        curve = np.maximum.accumulate(self.curve(label))
        if not curve[0] <= latency <= curve[-1]:
            return None
        return float(np.interp(latency, curve, self.rates))


def sweep(trace: Trace, cost: CostModel, contenders: Sequence[Contender], loads: Sequence[float], **limits: int) -> Sweep:
    """Serves a trace at each load, in units of what fcfs serves at most (`saturation`), by each contender."""
    most = saturation(trace, cost, **limits)
    rates = tuple(load * most for load in sorted(loads))
    found: dict[str, list[dict[str, float]]] = {}
    for c in contenders:
        settings = limits_of(cost, policy=c.policy, options=c.options, **limits)
        found[c.label] = [figures(simulate(trace.at_rate(rate), cost, *settings, swap=c.swap)) for rate in rates]
    return Sweep(most, rates, found)


def gains(result: Sweep, by: str, latencies: Sequence[float]) -> dict[str, list[float | None]]:
    """For each other contender, how many times the load of `by` it bears at each latency; None where either was not simulated."""
    base = [result.rate_at(by, latency) for latency in latencies]
    ratio = lambda rate, to: None if rate is None or to is None else rate / to
    return {
        label: [ratio(result.rate_at(label, latency), to) for latency, to in zip(latencies, base, strict=True)]
        for label in result.figures
        if label != by
    }
