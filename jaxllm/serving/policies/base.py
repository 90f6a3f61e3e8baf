"""What a policy is: ranks, when they are looked at again, and who may take whose place."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar

from jaxllm.errors import ConfigError
from jaxllm.serving.policies.outputs import Lengths

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence

# The smallest first. The last two of a rank are the numbers of the request and of the sequence, so that ranks differ.
Rank = tuple[float, ...]

by_rank = attrgetter("rank")
NEVER = float("inf")
_MOST_TENANTS = 10_000  # those with nothing to do are forgotten when there are more


class Ranked(list):
    """Sequences in the order of their ranks, which differ."""

    def add(self, sequence: Sequence) -> None:
        if not self or self[-1].rank < sequence.rank:
            self.append(sequence)
        else:
            insort(self, sequence, key=by_rank)

    def remove(self, sequence: Sequence) -> None:
        i = bisect_left(self, sequence.rank, key=by_rank)
        assert self[i] is sequence
        del self[i]

    def move(self, sequences: list[Sequence], rank: Callable[[Sequence], Rank]) -> None:
        """Ranks some anew."""
        if 16 * len(sequences) > len(self):
            for s in sequences:
                s.rank = rank(s)
            return self.rerank()
        for s in sequences:
            self.remove(s)
            s.rank = rank(s)
            self.add(s)

    def rerank(self) -> None:
        """Ranks have changed."""
        self.sort(key=by_rank)


@dataclass(eq=False, slots=True)
class Tenant:
    """Who requests come from. `service`: the tokens that it was served, weighted, as `vtc` counts them; `outputs`: the lengths of its
    sequences that have ended, `ended` of them, the newer the more they count."""

    name: str
    service: float = 0.0
    live: int = 0  # sequences that have not ended
    running: int = 0  # those that have a place
    last_due: float = 0.0  # when the newest of its sequences would be served at its share, as `adaptive` reckons
    ended: float = 0.0
    outputs: float = 0.0
    ahead: float = 0.0  # what `service` will be when all who wait have begun, as `vtc` reckons


@dataclass
class Book:
    """What policies know beside the sequences: tenants, and how long outputs are."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)
    num_live: int = 0  # tenants with something to do
    places: int = 1  # the most that ran at once
    ended: float = 0.0  # sequences, the newer the more they count
    service: float = 0.0  # seconds that those ran
    prompts: float = 0.0  # tokens of theirs
    # What `adaptive` has reckoned last:
    most: float = 0.0  # the longest handicap, in seconds,
    reach: float = 1.0  # the work that has it, in tokens,
    power: float = 1.0  # of the work that less of it goes by, and
    shortness: float = 0.0  # what short outputs count for

    def join(self, name: str) -> Tenant:
        """A sequence of a tenant comes. One that was away has saved nothing up (VTC, algorithm 2: its counter is lifted)."""
        tenant = self.tenants.get(name)
        if tenant is None:
            if len(self.tenants) >= _MOST_TENANTS:
                self.tenants = {name: tenant for name, tenant in self.tenants.items() if tenant.live}
            tenant = self.tenants[name] = Tenant(name)
        if not tenant.live:
            tenant.service = max(tenant.service, min((t.service for t in self.tenants.values() if t.live), default=0.0))
        tenant.live += 1
        self.num_live += tenant.live == 1
        return tenant

    def leave(self, sequence: Sequence, outputs: int) -> None:
        """A sequence has ended after so many tokens."""
        tenant = sequence.tenant
        tenant.live -= 1
        self.num_live -= tenant.live == 0
        if outputs > 0:
            self.lengths.add(sequence.num_prompt, outputs)
            self.ended, self.service = 0.999 * self.ended + 1, 0.999 * self.service + sequence.service
            self.prompts = 0.999 * self.prompts + sequence.num_prompt
            tenant.ended, tenant.outputs = 0.99 * tenant.ended + 1, 0.99 * tenant.outputs + outputs

    def expected_outputs(self, sequence: Sequence) -> float:
        """Tokens that a sequence will have drawn at its end: what those of alike prompts had, drawn to what its tenant's had the more
        of them there are, and at most `max_tokens`."""
        tenant, prior = sequence.tenant, self.lengths.expected(sequence.num_prompt)
        return min(sequence.max_tokens, (tenant.outputs + 10 * prior) / (tenant.ended + 10))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Ranks sequences; what the scheduler does with the ranks is the same for all.

    A policy holds constants and nothing else: what it decides depends on its arguments. A fork (a further completion of a request,
    a beam) has its request's arrival and ranks right behind it, so a request that goes on by forks does not queue up anew.
    """

    timed: ClassVar[bool] = False  # ranks change: `review` is called
    preempts: ClassVar[bool] = False  # a waiting sequence may take a running one's place
    uses_priority: ClassVar[bool] = False

    @classmethod
    def profile(cls, step_s: float, token_s: float) -> dict[str, float]:
        """Constants that are the machine's: of one whose shortest step takes `step_s` seconds, and each token of a prompt `token_s`."""
        return {}

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        """Of a sequence that comes."""
        return (sequence.arrival, sequence.number)

    def rank_again(self, sequence: Sequence, book: Book, now: float) -> Rank:
        """Of a sequence that has given up its place, and waits again."""
        return sequence.rank

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        """Ranks those anew whose ranks have changed, and puts them in order (`Ranked.rerank`); returns the moment after which ranks may
        be wrong again."""
        return NEVER

    def due(self, sequence: Sequence, now: float) -> float:
        """When all have to be ranked anew because of a sequence that has come, has begun to run, or has begun to wait."""
        return NEVER

    def turn_left(self, sequence: Sequence) -> float:
        """Seconds that a sequence may run, or go on running, before others come first: for estimates."""
        return 1.0

    def promoted(self, sequence: Sequence) -> float:
        """The moment when one that waits comes first for having waited so long."""
        return NEVER

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        """Whether a waiting sequence may take a running one's place, their ranks being this way round."""
        return True


def check_positive(policy: Policy, *names: str, zero: bool = False) -> None:
    """Raises ConfigError for a constant that is not above 0 (or, with `zero`, below it)."""
    for name in names:
        value = getattr(policy, name)
        if not (value >= 0 if zero else value > 0):
            raise ConfigError(f"{type(policy).__name__.lower()}: {name} must be {'at least' if zero else 'above'} 0, not {value!r}")
