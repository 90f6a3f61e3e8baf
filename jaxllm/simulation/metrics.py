"""What a run of a trace was like, in the figures that papers and servers give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.simulation.simulate import Outcome


@dataclass(frozen=True)
class Slo:
    """What a request is promised, in seconds; None: nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"slo {name} must be above 0, got {getattr(self, name)}")


def figures(outcome: Outcome, slo: Slo | None = None) -> dict[str, float]:
    """Of the requests of a trace:

    - mean, p50, p95 and p99 of TTFT (to the first token), JCT (to the last), TPOT ((JCT - TTFT) / (output tokens - 1), as vLLM's
      benchmarks have it; of requests of two tokens and more), ITL (between tokens) and normalized latency (JCT / output tokens, as
      Orca, vLLM and FastServe have it), in seconds;
    - goodput: the requests a second that met the SLO;
    - jain: Jain's index of the tenants' (of one tenant: the requests') slowdowns: 1 is fair; max_slowdown: the longest normalized
      latency over the median one;
    - what the scheduler did: steps, preemptions, tokens computed again, tokens found in the prefix cache, how busy the device was,
      bytes moved to the host and back, how long that took by itself, and how long steps waited for it.
    """
    trace = outcome.trace
    ttft, jct = outcome.first_token - trace.arrivals, outcome.finished - trace.arrivals
    normalized = jct / trace.outputs
    several = trace.outputs > 1
    tpot = (jct - ttft)[several] / (trace.outputs[several] - 1)
    result: dict[str, float] = {"requests": len(trace)}
    for name, values in (("ttft", ttft), ("jct", jct), ("tpot", tpot), ("normalized_latency", normalized)):
        result |= _spread(name, values, None)
    result |= _spread("itl", outcome.gaps, outcome.gap_counts)
    span = float(outcome.finished.max() - trace.arrivals[0])
    good = np.ones(len(trace), bool)
    if slo is not None and slo.ttft_s is not None:
        good &= ttft <= slo.ttft_s
    if slo is not None and slo.tpot_s is not None:
        good[several] &= tpot <= slo.tpot_s
    return result | {
        "requests_per_s": len(trace) / span,
        "output_tokens_per_s": float(trace.outputs.sum()) / span,
        "goodput_requests_per_s": float(good.sum()) / span,
        "jain": _jain(normalized, trace.tenants),
        "max_slowdown": float(normalized.max() / np.median(normalized)),
        "makespan_s": span,
        "device_busy": outcome.busy_s / span,
        "steps": outcome.steps,
        "preemptions": outcome.preemptions,
        "recomputed_tokens": outcome.recomputed_tokens,
        "cached_tokens": outcome.cached_tokens,
        "swapped_in_bytes": outcome.swapped_in_bytes,
        "swapped_out_bytes": outcome.swapped_out_bytes,
        "swap_s": outcome.swap_s,
        "exposed_swap_s": outcome.exposed_swap_s,
    }


def _spread(name: str, values: np.ndarray, counts: np.ndarray | None) -> dict[str, float]:
    if counts is not None and counts.sum():
        order = np.argsort(values, kind="stable")
        values, places = values[order], np.cumsum(counts[order])
        mean = float((values * counts[order]).sum() / places[-1])
        percentile = lambda q: float(values[np.searchsorted(places, np.ceil(q / 100 * places[-1]))])
    elif len(values):
        mean, percentile = float(values.mean()), lambda q: float(np.percentile(values, q))
    else:
        mean, percentile = 0.0, lambda q: 0.0
    return {f"mean_{name}_s": mean} | {f"p{q}_{name}_s": percentile(q) for q in (50, 95, 99)}


def _jain(normalized: np.ndarray, tenants) -> float:
    x = normalized
    if tenants is not None and len(set(tenants)) > 1:
        names = np.asarray(tenants)
        x = np.array([normalized[names == tenant].mean() for tenant in sorted(set(tenants))])
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))
