"""Fair shares by tenant (Virtual Token Counter: Sheng et al., arXiv 2401.00588)."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError
from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, Ranked, Tenant, check_positive

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
    review_s: float = 0.1
    "Tenants are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "review_s")
        for name, weight in self.weights.items():
            if not weight > 0:
                raise ConfigError(f"vtc: the weight of tenant {name!r} must be above 0, not {weight!r}")

    def _share(self, tenant: Tenant) -> float:
        return tenant.service / self.weights.get(tenant.name, 1.0)

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        tenant = sequence.tenant
        before = max(self._share(tenant), tenant.ahead)
        tenant.ahead = before + sequence.num_tokens / self.weights.get(tenant.name, 1.0)
        return (before, sequence.arrival, sequence.number)

    def rank_again(self, sequence: Sequence, book: Book, now: float) -> Rank:
        return (self._share(sequence.tenant), sequence.arrival, sequence.number)

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        for s in running:
            s.rank = (self._share(s.tenant), s.arrival, s.number)
        # As if all who wait were admitted at once, each prompt counted when its turn comes: else one tenant took all places that a
        # step frees.
        by_tenant: dict[Tenant, list[Sequence]] = {}
        for s in waiting:
            by_tenant.setdefault(s.tenant, []).append(s)
        for tenant, sequences in by_tenant.items():
            before, weight = self._share(tenant), self.weights.get(tenant.name, 1.0)
            sequences.sort(key=attrgetter("number"))
            for s in sequences:
                s.rank = (before, s.arrival, s.number)
                before += s.num_tokens / weight
            tenant.ahead = before
        running.rerank()
        waiting.rerank()
        return now + self.review_s if waiting else NEVER
