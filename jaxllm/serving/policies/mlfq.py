"""Skip-join multi-level feedback queue (FastServe: Wu et al., arXiv 2305.05920, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.serving.policies.base import NEVER, Book, Policy, Rank, Ranked, check_positive

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Sequence


@dataclass(frozen=True, kw_only=True)
class Mlfq(Policy):
    """Queues of rising quanta; whoever has spent its quantum goes down by one.

    A request joins the first queue whose quantum its prompt fits in, as its profiled time tells, so that it is not demoted before
    its first token. In a queue, who joined first is first. Who waits for `starvation_s` goes to the first queue.
    """

    timed = preempts = True

    first_quantum_s: float = 0.031
    "Of the first queue: the shortest iteration."
    growth: float = 2.0
    "Each queue's quantum is so many times that of the one before."
    levels: int = 10
    "Queues."
    starvation_s: float = 3.0
    "Waiting for so long takes a request to the first queue (alpha: 0.3 in the paper, 3 in its artifact)."
    step_s: float = 0.031
    "The profile of a prompt's time: at least this,"
    prompt_token_s: float = 1.4e-4
    "and so much for each token that has to be computed."

    def __post_init__(self) -> None:
        check_positive(self, "first_quantum_s", "levels", "starvation_s", "step_s", "prompt_token_s")
        check_positive(self, "growth")

    @classmethod
    def profile(cls, step_s: float, token_s: float) -> dict[str, float]:
        return {"first_quantum_s": step_s, "step_s": step_s, "prompt_token_s": token_s}

    def quantum(self, level: int) -> float:
        """Seconds."""
        return self.first_quantum_s * self.growth**level

    def rank(self, sequence: Sequence, book: Book, now: float) -> Rank:
        prompt_s = max(self.step_s, sequence.num_tokens * self.prompt_token_s)
        while sequence.level < self.levels - 1 and self.quantum(sequence.level) < prompt_s:
            sequence.level += 1
        return (sequence.level, now, sequence.arrival, sequence.number)

    def due(self, sequence: Sequence, now: float) -> float:
        if sequence.slot < 0:
            return self.promoted(sequence)
        return now + self.turn_left(sequence) if sequence.level < self.levels - 1 else NEVER

    def review(self, running: Ranked, waiting: Ranked, book: Book, now: float) -> float:
        quanta, last = [self.quantum(level) for level in range(self.levels)], self.levels - 1
        spent, lasts = [], NEVER  # until the first quantum of the others is spent
        for s in running:
            if s.level < last:
                if (left := quanta[s.level] - s.service + s.spent) > 1e-9:
                    lasts = min(lasts, left)
                else:
                    spent.append(s)
        starving, since, soonest = [], now - self.starvation_s, NEVER
        for s in waiting:
            if s.level:
                if s.turn <= since:
                    starving.append(s)
                elif s.turn < soonest:
                    soonest = s.turn
        running.move(spent, lambda s: self._join(s, s.level + 1, now))
        waiting.move(starving, lambda s: self._join(s, 0, now))
        lasts = min([lasts, *(quanta[s.level] for s in spent if s.level < last)])
        return min(now + lasts, soonest + self.starvation_s)

    def _join(self, s: Sequence, level: int, now: float) -> Rank:
        s.level, s.spent = level, s.service
        return (level, now, s.arrival, s.number)

    def turn_left(self, sequence: Sequence) -> float:
        return max(0.0, self.quantum(sequence.level) - (sequence.service - sequence.spent))

    def promoted(self, sequence: Sequence) -> float:
        return sequence.turn + self.starvation_s if sequence.level else NEVER

    def displaces(self, waiting: Sequence, running: Sequence, now: float) -> bool:
        return waiting.level < running.level
