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
    up. One that waits takes the place of one whose tenant has, by their weights, at least two places more than its own: nobody waits for
    those of a flood to end."""

    timed = preempts = True

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
        before = self._first(tenant, book)
        if tenant.live > 1:  # it has others, some of which may wait
            before = max(before, tenant.ahead)
        tenant.ahead = before + sequence.num_tokens / self.weights.get(tenant.name, 1.0)
        return (before, sequence.arrival, sequence.number)

    def _first(self, tenant: Tenant, book: Book) -> float:
        """Where a tenant's next sequence ranks: first, while it has no more than its share of the places; counters are for the others."""
        within = tenant.live * book.num_live <= max(book.places, book.num_live)
        return 0.0 if within else self._share(tenant)

    def rank_again(self, sequence: Sequence, book: Book, now: float) -> Rank:
        return (self._share(sequence.tenant), sequence.arrival, sequence.number)

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        places = lambda tenant, more: (tenant.running + more) / self.weights.get(tenant.name, 1.0)
        return places(waiting.tenant, 1) < places(running.tenant, 0)

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        book.places = max(book.places, len(running))
        # As if all who wait were admitted at once, each prompt counted when its turn comes: else one tenant took all places that a
        # step frees. Likewise who runs: the last to have come of the tenant that has most gives way first.
        for tenant in self._rank_each(running, book):
            tenant.ahead = self._first(tenant, book)
        for tenant, ahead in self._rank_each(waiting, book).items():
            tenant.ahead = ahead
        running.rerank()
        waiting.rerank()
        return now + self.review_s if waiting else NEVER

    def _rank_each(self, queue: Ranked, book: Book) -> dict[Tenant, float]:
        """Ranks a tenant's sequences one behind the other; returns where its next one would be."""
        ahead: dict[Tenant, float] = {}
        for s in sorted(queue, key=attrgetter("number")):
            tenant = s.tenant
            before = ahead[tenant] if tenant in ahead else self._first(tenant, book)
            s.rank = (before, s.arrival, s.number)
            ahead[tenant] = before + s.num_tokens / self.weights.get(tenant.name, 1.0)
        return ahead
