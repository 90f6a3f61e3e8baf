"""Policies that go by how much work a request is, as far as one can tell before it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, Ranked, check_positive

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence


@dataclass(frozen=True, kw_only=True)
class Hrrn(Policy):
    """Highest response ratio next (Hansen, 1971): (waited + work) / work, the highest first. Short ones come first, and waiting
    brings everyone forward. Nobody who runs is disturbed, unless pages run out."""

    timed = True

    token_s: float = 2e-3
    "Seconds of a generated token, its share of a step."
    prompt_weight: float = 0.1
    "What a token of the prompt costs, in generated tokens."
    review_s: float = 0.1
    "Those who wait are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "token_s", "prompt_weight", "review_s")

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        sequence.spent = self.token_s * (self.prompt_weight * sequence.num_tokens + book.expected_outputs(sequence))
        return ((sequence.arrived - now) / sequence.spent, sequence.arrival, sequence.number)

    rank_again = rank

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        for s in waiting:
            s.rank = ((s.arrived - now) / s.spent, s.arrival, s.number)
        waiting.rerank()
        return now + self.review_s if waiting else NEVER


@dataclass(frozen=True, kw_only=True)
class Sjf(Policy):
    """Shortest job first, by a prediction: a request's tenant's and its likes' outputs so far, of no more than max_tokens
    (`Book.expected_outputs`). Nobody who runs is disturbed, unless pages run out."""

    timed = True

    prompt_weight: float = 0.1
    "What a token of the prompt costs, in generated tokens."
    ageing: float = 10.0
    "A second of waiting makes up for so many generated tokens: nobody waits for ever."
    review_s: float = 2.0
    "Those who wait are looked at again so often: what is known of lengths may have changed."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "review_s")
        check_positive(self, "ageing", zero=True)

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        work = self.prompt_weight * sequence.num_tokens + book.expected_outputs(sequence)
        return (work + self.ageing * sequence.arrived, sequence.arrival, sequence.number)

    rank_again = rank

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        for s in waiting:
            s.rank = self.rank(s, book, now)
        waiting.rerank()
        return now + self.review_s if waiting else NEVER


@dataclass(frozen=True, kw_only=True)
class Srpt(Policy):
    """Shortest remaining time first, where `max_tokens` says how long outputs will be. The simulator uses it as an oracle: what could
    be had if lengths were known."""

    timed = preempts = True

    prompt_weight: float = 0.1
    "What a token that is not in the cache costs, in generated tokens."
    gain: float = 2.0
    "One takes another's place only if its work is so many times less."
    ageing: float = 0.0
    "A second of waiting makes up for so many generated tokens: above 0, nobody waits for ever."
    review_s: float = 0.25
    "Those who run are compared anew so often; the work of those who wait does not change."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "gain", "review_s")
        check_positive(self, "ageing", zero=True)

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        return (self._work(sequence) + self.ageing * sequence.arrived, sequence.arrival, sequence.number)

    def _work(self, s: Sequence) -> float:
        left = s.num_prompt + s.max_tokens - s.num_tokens
        return left + self.prompt_weight * (s.num_tokens - s.num_computed)

    rank_again = rank

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        for s in running:
            s.rank = self.rank(s, book, now)
        running.rerank()
        return now + self.review_s

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        return self._work(waiting) * self.gain < self._work(running)
