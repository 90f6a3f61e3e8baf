"""Policies that go by how much work a request is, as far as one can tell before it has ended."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, check_positive

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

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (-1.0, sequence.arrival, sequence.number)

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Seq[Sequence], waiting: Seq[Sequence], book: Book, now: float) -> float:
        for s in waiting:
            work = self.token_s * (self.prompt_weight * s.num_tokens + book.expected_outputs(s))
            s.rank = (-1 - (now - s.arrived) / work, s.arrival, s.number)
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
    review_s: float = 0.1
    "Those who wait are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "review_s")
        check_positive(self, "ageing", zero=True)

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return (NEVER, sequence.arrival, sequence.number)

    def due(self, sequence: Sequence, now: float) -> float:
        return now

    def review(self, running: Seq[Sequence], waiting: Seq[Sequence], book: Book, now: float) -> float:
        for s in waiting:
            work = self.prompt_weight * s.num_tokens + book.expected_outputs(s)
            s.rank = (work + self.ageing * s.arrived, s.arrival, s.number)
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
    review_s: float = 0.25
    "Those who run are compared anew so often."

    def __post_init__(self) -> None:
        check_positive(self, "prompt_weight", "gain", "review_s")

    def rank(self, sequence: Sequence, now: float) -> Rank:
        s = sequence
        left = s.num_prompt + s.max_tokens - s.num_tokens
        return (left + self.prompt_weight * (s.num_tokens - s.num_computed), s.arrival, s.number)

    def due(self, sequence: Sequence, now: float) -> float:
        return now + self.review_s

    def review(self, running: Seq[Sequence], waiting: Seq[Sequence], book: Book, now: float) -> float:
        for queue in (running, waiting):
            for s in queue:
                s.rank = self.rank(s, now)
        return now + self.review_s

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        return waiting.rank[0] * self.gain < running.rank[0]
