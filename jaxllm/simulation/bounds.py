"""What no scheduler can do better than, by what is known of the machine alone."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

from jaxllm.simulation.cost import CostModel
from jaxllm.simulation.traces import Trace


def least_jct(trace: Trace, cost: CostModel, max_num_seqs: int) -> float:
    """A mean time to completion, in seconds, below which no policy comes, even one that knows all lengths and the future.

    A step takes at least `step_s`, of which each of its at most `max_num_seqs` sequences uses a share, and at least `token_s` for each
    of its tokens; so it takes at least any mixture of the two, and each sequence has its part of that to be done: its work. One machine
    that may do the work of one sequence alone is no slower. There, the mean of the moments at which the work of each is done is least
    if the one of the least work goes first (mean busy times: Goemans et al., SIAM J. Discrete Math. 15, 2002, "Single machine
    scheduling with release dates"). But a sequence draws a token in a step, so half of its outputs are drawn at least half the time
    of drawing them before its end, and its prompt's work is done before (for parallel machines: Eastman, Even and Isaacs, 1964).
    What prompts have in common costs nothing here: it may be cached.
    """
    outputs, prompts = trace.outputs.astype(float), trace.prompts.astype(float)
    new = _tokens_of_its_own(trace)
    step = min(cost.shapes.values()) if cost.shapes else cost.step_s
    attended = cost.context_token_s * (outputs * prompts + outputs * (outputs - 1) / 2)
    longest = cost.context_token_s * (prompts + outputs)
    least = float((outputs * step + attended).mean())  # nobody in its way
    for mixture in np.linspace(0, 1, 11):
        token = 0.0 if cost.shapes else (1 - mixture) * cost.token_s
        share = mixture * step / max_num_seqs + token + cost.sequence_s
        drawing, reading = outputs * share + attended, new * token
        drawing_s = drawing * (step + longest) / (share + longest)
        part = drawing / (drawing + reading)
        first_s = (share + cost.context_token_s * prompts) * (step + longest) / (share + longest)  # may read the prompt's end, too
        moments = _mean_busy_times(trace.arrivals, drawing + reading) + drawing_s * (1 - part / 2) - first_s * (1 - part) / 2
        least = max(least, float((moments - trace.arrivals).mean()))
    return least


def _tokens_of_its_own(trace: Trace) -> np.ndarray:
    """[N] of each prompt, the tokens that are not in blocks that others begin with too."""
    if trace.blocks is None:
        return trace.prompts.astype(float)
    times = Counter(block for blocks in trace.blocks for block in blocks)
    shared = [sum(times[block] > 1 for block in blocks) * trace.block for blocks in trace.blocks]
    return np.maximum(0.0, trace.prompts - np.array(shared))


def _mean_busy_times(arrivals: np.ndarray, work: np.ndarray) -> np.ndarray:
    """For each, the mean of the moments at which its work is done, by one machine that does a second of it in a second, the least first."""
    times, left, now, coming, n = np.zeros(len(work)), work.tolist(), 0.0, 0, len(work)
    come = [*arrivals.tolist(), float("inf")]
    ready: list[tuple[float, int]] = []
    while coming < n or ready:
        if not ready:
            now = max(now, come[coming])
        while come[coming] <= now:
            heapq.heappush(ready, (float(work[coming]), coming))
            coming += 1
        total, i = ready[0]
        until = min(now + left[i], come[coming])
        times[i] += (until - now) * (now + until) / 2 / total
        left[i] -= until - now
        now = until
        if left[i] <= 1e-9 * total:
            heapq.heappop(ready)
    return times
