"""Our own: least work to an ending first, as far as one can tell, and never for ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import Book, Policy, Rank, Ranked, check_positive

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence

_FIRST_SERVICE_S = 1.0  # a guess, until requests have ended
_MOVED = 0.03  # handicaps that have changed by less are left as they are


@dataclass(frozen=True, kw_only=True)
class Adaptive(Policy):
    """Ranks by arrival plus a handicap, in seconds: the work that is likely to be left.

    The work is the part of its tokens that has to be computed (not what is cached) and Gittins's index of what it has drawn, both in
    generated tokens (`Lengths.index`): what distinguishes short from long is learned from the requests that have ended. As everyone's
    arrival stays where it is, whoever waits ages continuously, and nobody is overtaken by one that comes later than its handicap:
    no handicap is longer than `patience` or `most_s` says.
    """

    timed = preempts = True

    prompt_weight: float = 0.1
    "What a token that is not in the cache costs, in generated tokens."
    reach: float = 1.0
    "The work of so many mean requests has the longest handicap; less, as much less of it."
    shortness: float = 0.75
    "0 is best for the mean time to completion, 1 for the mean of that time per token."
    patience: float = 3.5
    "The longest handicap, in mean times that requests ran for: who came so much earlier goes first, whatever it is."
    backlog: float = 0.4
    "But at least so much of the time that the one who came first of those who wait has been here: what is little under overload."
    most_s: float | None = None
    "The longest handicap in seconds, in place of all that."
    margin: float = 0.05
    "One takes another's place only if it ranks ahead by more than this, in longest handicaps."
    review_s: float = 0.25
    "All are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "reach", "review_s")
        check_positive(self, "shortness", "patience", "backlog", "margin", zero=True)
        if self.most_s is not None:
            check_positive(self, "most_s", zero=True)

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        s, index = sequence, book.lengths.indices(self.shortness)
        work = self.prompt_weight * (s.num_tokens - s.num_computed) + index(s.num_tokens - s.num_prompt)
        return (s.arrived + min(book.most, book.token_s * work), s.arrival, s.number)

    rank_again = rank

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        most, lengths, prompts = self.most_s, book.lengths, self.prompt_weight * book.prompts / (book.ended + 1)
        # Where most of the work is prompts, it is known beforehand, and short ones can be let past without pushing back those who turn
        # out to be long: handicaps can be larger. Nearly 1 where outputs are most of it.
        guessed = 1 - (prompts / (lengths.mean + prompts)) ** 2
        if most is None:
            longest_wait = now - min([s.arrived for s in waiting], default=now)
            most = max(self.patience * (book.service + _FIRST_SERVICE_S) / (book.ended + 1), self.backlog * longest_wait) / guessed
        token_s = most * guessed / (self.reach * (lengths.mean + prompts))
        # The work of those who wait does not change: they are ranked anew when what is known of all has.
        if moved := abs(token_s - book.token_s) > _MOVED * book.token_s or abs(most - book.most) > _MOVED * book.most:
            book.token_s, book.most = token_s, most
        for queue in (running, waiting) if moved else (running,):
            for s in queue:
                s.rank, s.spent = self.rank(s, book, now), self.margin * most
            queue.rerank()
        return now + self.review_s

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        return waiting.rank[0] + running.spent < running.rank[0]
