"""Fair shares by tenant (Virtual Token Counter: Sheng et al., arXiv 2401.00588)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError
from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, check_positive

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence


@dataclass(frozen=True, kw_only=True)
class Vtc(Policy):
    """The tenant that was served least is next, with its oldest request. Service is counted as in the paper: 1 for each token
    computed, 1 more for each generated (`Tenant.service`), divided by the tenant's weight. A tenant that comes back has saved nothing
    up. Nobody who runs is disturbed, unless pages run out: then who was served most gives way."""

    timed = True

    weights: dict[str, float] = field(default_factory=dict)
    "Shares of tenants; 1 for those that are not named."
    review_s: float = 0.05
    "Tenants are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "review_s")
        for name, weight in self.weights.items():
            if not weight > 0:
                raise ConfigError(f"vtc: the weight of tenant {name!r} must be above 0, not {weight!r}")

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (NEVER, sequence.arrival, sequence.number)

    def due(self, sequence: Sequence, now: float) -> float:
        return now if sequence.slot < 0 else NEVER

    def review(self, running: Seq[Sequence], waiting: Seq[Sequence], book: Book, now: float) -> float:
        share = lambda tenant: tenant.service / self.weights.get(tenant.name, 1.0)
        for s in running:
            s.rank = (share(s.tenant), s.arrival, s.number)
        # As if all who wait were admitted at once, each prompt counted when its turn comes: else one tenant took all places that a
        # step frees.
        counters: dict[str, float] = {}
        for s in sorted(waiting, key=lambda s: s.number):
            name = s.tenant.name
            before = counters.get(name)
            if before is None:
                before = share(s.tenant)
            s.rank = (before, s.arrival, s.number)
            counters[name] = before + s.num_tokens / self.weights.get(name, 1.0)
        return now + self.review_s if waiting else NEVER
