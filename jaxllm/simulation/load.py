"""How much a machine can take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxllm.simulation.cost import CostModel
from jaxllm.simulation.simulate import limits_of, simulate
from jaxllm.simulation.traces import Trace


def saturation(trace: Trace, cost: CostModel, **limits: int) -> float:
    """Requests a second that fcfs serves while all of a trace's (its first 2000) are there from the start: until as few are left
    as run at the same time, for a batch that runs empty says nothing of one that is kept full."""
    trace = trace.first(2000)
    outcome = simulate(replace(trace, arrivals=np.zeros(len(trace))), cost, *limits_of(cost, policy="fcfs", **limits))
    finished = np.sort(outcome.finished)
    counted = max(1, len(trace) - limits["max_num_seqs"])
    return counted / float(finished[counted - 1])
