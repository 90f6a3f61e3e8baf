"""The scheduler without a chip: traces, cost models, the loop that drives the real scheduler, and its figures."""

from jaxllm.simulation.cost import MACHINES, CostModel, cost_model
from jaxllm.simulation.metrics import Slo, figures
from jaxllm.simulation.simulate import Outcome, limits_of, simulate
from jaxllm.simulation.traces import Trace, read_trace
from jaxllm.simulation.workloads import WORKLOADS, Arrivals, Lengths, draw_arrivals, draw_workload

__all__ = [
    "MACHINES",
    "WORKLOADS",
    "Arrivals",
    "CostModel",
    "Lengths",
    "Outcome",
    "Slo",
    "Trace",
    "cost_model",
    "draw_arrivals",
    "draw_workload",
    "figures",
    "limits_of",
    "read_trace",
    "simulate",
]
