"""Which request comes first. A policy only ranks; what the scheduler does with the ranks is the same for all.

A rank is a tuple, the smallest first. A fork (a further completion of a request, a beam) ranks right behind the request that it
came from, so a request that goes on by forks does not queue up anew.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter
from typing import Literal

Policy = Literal["fcfs", "priority"]
Rank = tuple[int, ...]

# (priority, arrival of the request, arrival of the sequence) -> rank
POLICIES: dict[str, Callable[[int, int, int], Rank]] = {
    "fcfs": lambda priority, request, sequence: (request, sequence),
    "priority": lambda priority, request, sequence: (priority, request, sequence),  # the lower number first, as in vLLM
}

_rank = attrgetter("rank")


class Ranked(list):
    """Sequences in the order of their ranks, which differ."""

    def add(self, sequence) -> None:
        if not self or self[-1].rank < sequence.rank:
            self.append(sequence)
        else:
            insort(self, sequence, key=_rank)

    def remove(self, sequence) -> None:
        i = bisect_left(self, sequence.rank, key=_rank)
        assert self[i] is sequence
        del self[i]
