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

__all__ = ["NEVER", "POLICIES", "Book", "Policy", "Rank", "Ranked", "Tenant", "make_policy", "needs_profile", "with_profile"]

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
    return from_dict(_policy(name), options or {}, f"policy {name}")


def needs_profile(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the policy has constants that are the machine's and are not given."""
    return bool(_policy(name).profile(1.0, 1.0).keys() - options.keys())


def with_profile(name: str, options: Mapping[str, Any], step_s: float, token_s: float) -> dict[str, Any]:
    """The options, and for those not given what follows from the machine (`Policy.profile`)."""
    return _policy(name).profile(step_s, token_s) | dict(options)


def _policy(name: str) -> type[Policy]:
    if name not in POLICIES:
        raise ConfigError(unknown(name, list(POLICIES), noun="scheduling policy"))
    return POLICIES[name]
