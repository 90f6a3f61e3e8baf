"""Which request comes first: one small file a policy, over the machinery that is the same for all (`serving/scheduler.py`)."""

from collections.abc import Mapping
from typing import Any

from jaxllm.config import from_dict, unknown
from jaxllm.errors import ConfigError
from jaxllm.serving.policies.adaptive import Adaptive
from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, Ranked, Tenant
from jaxllm.serving.policies.lengths import Hrrn, Sjf, Srpt
from jaxllm.serving.policies.mlfq import Mlfq
from jaxllm.serving.policies.order import Fcfs, PreemptivePriority, Priority
from jaxllm.serving.policies.vtc import Vtc

__all__ = ["NEVER", "POLICIES", "Book", "Policy", "Rank", "Ranked", "Tenant", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "priority_preempt": PreemptivePriority,
    "mlfq": Mlfq,
    "hrrn": Hrrn,
    "sjf": Sjf,
    "srpt": Srpt,
    "vtc": Vtc,
    "adaptive": Adaptive,
}


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name with these constants. Raises ConfigError, naming what it does not know."""
    if name not in POLICIES:
        raise ConfigError(unknown(name, list(POLICIES), noun="scheduling policy"))
    return from_dict(POLICIES[name], options or {}, f"policy {name}")
