"""Will it fit, how fast can it be: answers for chips that are not here, from the programs that would run there."""

from jaxllm.planning.chips import CHIPS, Chip, Topology, find_topology
from jaxllm.planning.serving import ServingPlan, StepReport, plan_serving

__all__ = ["CHIPS", "Chip", "ServingPlan", "StepReport", "Topology", "find_topology", "plan_serving"]
