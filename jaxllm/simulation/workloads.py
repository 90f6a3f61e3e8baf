"""Requests to simulate: drawn at random, in the likeness of known data sets.

Lengths are lognormal, with (mu, sigma) fitted to ShareGPT and Alpaca, the data sets of FastServe's evaluation (Wu et al., arXiv
2305.05920, section 6.1). Arrivals are a gamma process of a rate and a coefficient of variation (1: Poisson), whose rate may rise
in bursts (Wang et al., arXiv 2401.17644).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.simulation.traces import Trace


@dataclass(frozen=True)
class Lengths:
    """Of prompts and outputs: (mu, sigma) of their logarithms."""

    prompt: tuple[float, float]
    output: tuple[float, float]


WORKLOADS = {
    "sharegpt": Lengths((4.45, 1.5), (5.55, 1.05)),
    "alpaca": Lengths((2.85, 0.45), (3.65, 0.95)),
}


@dataclass(frozen=True)
class Arrivals:
    """How requests come."""

    rate: float = 1.0
    "Requests a second, on average."
    cv: float = 1.0
    "Coefficient of variation of the times between them; 1 is a Poisson process."
    burst_factor: float = 1.0
    "In a burst, requests come so many times as fast as between bursts."
    burst_share: float = 0.2
    "The share of requests that come in bursts."
    burst_length: int = 50
    "Requests in a burst, on average."

    def __post_init__(self) -> None:
        for name in ("rate", "cv", "burst_length"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.burst_factor >= 1:
            raise ConfigError(f"burst_factor must be at least 1, got {self.burst_factor}")
        if not 0 < self.burst_share < 1:
            raise ConfigError(f"burst_share must be above 0 and below 1, got {self.burst_share}")


def draw_arrivals(rng: np.random.Generator, n: int, arrivals: Arrivals) -> np.ndarray:
    """float64 [n], seconds, from 0 on."""
    shape = 1 / arrivals.cv**2
    gaps = rng.gamma(shape, 1 / shape, n)
    if arrivals.burst_factor > 1:
        calm_length = arrivals.burst_length * (1 - arrivals.burst_share) / arrivals.burst_share
        bursting, i = False, 0
        while i < n:
            length = int(rng.geometric(min(1.0, 1 / (arrivals.burst_length if bursting else calm_length))))
            if bursting:
                gaps[i : i + length] /= arrivals.burst_factor
            bursting, i = not bursting, i + length
        gaps *= 1 / ((1 - arrivals.burst_share) + arrivals.burst_share / arrivals.burst_factor)  # so that the rate is that asked for
    times = np.cumsum(gaps / arrivals.rate)
    return times - times[0]


def draw_workload(name: str, n: int, arrivals: Arrivals, *, seed: int, max_model_len: int) -> Trace:
    """n requests of a known kind. Lengths are cut so that prompt and output fit a model. Raises ConfigError."""
    if name not in WORKLOADS:
        raise ConfigError(f"there is no workload {name!r}: known are {', '.join(WORKLOADS)}")
    rng, lengths = np.random.default_rng(seed), WORKLOADS[name]
    draw = lambda mu, sigma: np.maximum(1, np.rint(rng.lognormal(mu, sigma, n))).astype(np.int64)
    prompts = np.minimum(draw(*lengths.prompt), max_model_len // 2)
    outputs = np.minimum(draw(*lengths.output), max_model_len - prompts)
    return Trace(draw_arrivals(rng, n, arrivals), prompts, outputs)
