"""Policies whose ranks never change: by arrival, by priority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import Book, Policy, Rank

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence


@dataclass(frozen=True, kw_only=True)
class Fcfs(Policy):
    """First come, first served."""


@dataclass(frozen=True, kw_only=True)
class Priority(Policy):
    """The lowest `priority` first, as in vLLM, then by arrival. Who runs is not disturbed, unless pages run out."""

    uses_priority = True

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        return (sequence.priority, sequence.arrival, sequence.number)


@dataclass(frozen=True, kw_only=True)
class PreemptivePriority(Priority):
    """As `priority`; but one of a lower number takes the place of one of a higher number that runs."""

    preempts = True

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        return waiting.priority < running.priority
