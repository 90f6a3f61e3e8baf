"""Our own: least work to an ending first, as far as one can tell, and never for ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import Book, Policy, Rank, Ranked, check_positive

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence

_FIRST_SERVICE_S = 1.0  # a guess, until requests have ended
_LEAST_SURPRISE = 0.13  # however well the work is known: P99 suffers from longer handicaps
_MOVED = 0.03  # handicaps that have changed by less are left as they are


@dataclass(frozen=True, kw_only=True)
class Adaptive(Policy):
    """Ranks by arrival plus a handicap, in seconds: the work that is likely to be left.

    The work is the part of its tokens that has to be computed (not what is cached) and Gittins's index of what it has drawn, both in
    generated tokens (`Lengths.index`): what distinguishes short from long is learned from the requests that have ended. As everyone's
    arrival stays where it is, whoever waits ages continuously, and nobody is overtaken by one that comes later than its handicap:
    no handicap is longer than `patience`, `backlog` or `most_s` say. Of several tenants, one that sends more than its share is not let
    before the others: its requests rank by when their turn would be at its share (`_due`).
    """

    timed = preempts = True

    prompt_weight: float = 0.1
    "What a token that is not in the cache costs, in generated tokens."
    reach: float = 0.4
    "The work of so many mean requests has the longest handicap, if nothing of it is known beforehand; less, as much less of it."
    flatness: float = 0.25
    "Between nothing and the longest, handicaps rise by the work to this power, or to that of the part of it that is a surprise, if larger."
    shortness: float = 1.25
    "0 is best for the mean time to completion, 1 for the mean of that time per token."
    patience: float = 7.0
    "The longest handicap, in mean times that requests ran for: who came so much earlier goes first, whatever it is."
    backlog: float = 0.4
    "But at least so much of the time that the one who came first of those who wait has been here: what is little under overload."
    most_s: float | None = None
    "The longest handicap in seconds, in place of all that."
    seniority: float = 3.0
    "A second that one has run is worth so many of having waited: who turns out to be long ends last as it is, and is not held up more."
    margin: float = 0.05
    "One takes another's place only if it ranks ahead by more than this, in longest handicaps."
    review_s: float = 0.25
    "All are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "reach", "flatness", "review_s")
        check_positive(self, "shortness", "patience", "backlog", "seniority", "margin", zero=True)
        if self.most_s is not None:
            check_positive(self, "most_s", zero=True)

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        s = sequence
        if s.due == 0.0:
            s.due = self._due(s, book)
        drawn = book.lengths.index(s.num_prompt, s.num_tokens - s.num_prompt, book.shortness)
        work = self.prompt_weight * (s.num_tokens - s.num_computed) + drawn
        handicap = book.most * min(1.0, work / book.reach) ** book.power
        return (s.due + handicap - self.seniority * s.service, s.arrival, s.number)

    rank_again = rank

    def _due(self, sequence: Sequence, book: Book) -> float:
        """When it came; or, if there are several tenants, when its turn would be if its own had its share of the places and all were of
        the mean length (start-time fair queueing: Goyal et al., 1996). Of one tenant, nobody is due before who came earlier."""
        tenant, due = sequence.tenant, max(sequence.arrived, sequence.tenant.last_due)
        ran = (book.service + _FIRST_SERVICE_S) / (book.ended + 1)
        tenant.last_due = due + (ran * book.num_live / book.places if book.num_live > 1 else 0.0)
        return due

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        book.places = max(book.places, len(running))
        most, lengths, prompts = self.most_s, book.lengths, self.prompt_weight * book.prompts / (book.ended + 1)
        # The less of the work is a surprise, the further short ones can be let past without pushing back those who turn out to be long,
        # and the more the order that is best for the mean time is best for the time per token, too.
        surprise = min(1.0, (lengths.spread / (lengths.mean + prompts)) ** 2)
        shortness = round(self.shortness * surprise, 1)
        if most is None:
            longest_wait = now - min([s.arrived for s in waiting], default=now)
            ran = (book.service + _FIRST_SERVICE_S) / (book.ended + 1)
            most = max(self.patience * ran, self.backlog * longest_wait / max(_LEAST_SURPRISE, surprise))
        reach = self.reach * (lengths.mean + prompts) / max(0.01, surprise)
        # What is known beforehand is told apart by its order of magnitude, and the large are alike: it is the largest that make the P99.
        power = max(self.flatness, round(surprise, 1))
        # The work of those who wait does not change: they are ranked anew when what is known of all has.
        known, new = (book.reach, book.most, book.shortness, book.power), (reach, most, shortness, power)
        if moved := any(abs(a - b) > _MOVED * a for a, b in zip(known, new, strict=True)):
            book.reach, book.most, book.shortness, book.power = new
        for queue in (running, waiting) if moved else (running,):
            for s in queue:
                s.rank, s.spent = self.rank(s, book, now), self.margin * most
            queue.rerank()
        return now + self.review_s

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        crowded = waiting.tenant.running + 1 < running.tenant.running  # its tenant has at least two places more
        return waiting.rank[0] + (0.0 if crowded else running.spent) < running.rank[0]
