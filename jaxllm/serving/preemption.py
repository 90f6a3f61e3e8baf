"""Who gives way: the running sequences whose places waiting ones of better ranks may take (`Policy.displaces`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import Scheduler, Sequence

_MOST_LOOKED_AT = 64  # waiting sequences: those behind them have little to say, and a step should cost little


def find_victims(scheduler: Scheduler, now: float) -> list[Sequence]:
    """Those of the last ranks whose slots and pages let waiting ones in, the last first. None is thrown out in vain: either it makes
    room, or it stays. One that has not drawn a token since it was admitted stays, and so do all of better ranks."""
    policy, victims = scheduler.policy, []
    candidates, size = scheduler.running, scheduler.config.page_size
    slots = scheduler.config.max_num_seqs - len(candidates)
    pages = scheduler.num_unpromised
    last = len(candidates)  # those from here on are victims
    for waiting in scheduler.waiting[:_MOST_LOOKED_AT]:
        # What it needs beyond pages that others use; what is cached counts as free, and is its own to take.
        need = -(-waiting.num_tokens // size) - scheduler.num_in_use(waiting)
        first = last
        while slots < 1 or pages < need:
            if first == 0:
                return victims
            victim = candidates[first - 1]
            if waiting.rank > victim.rank or victim.num_tokens <= victim.num_known or not policy.displaces(waiting, victim, now):
                return victims
            first -= 1
            slots += 1
            pages += len(victim.pages) + victim.promised
        victims += candidates[first:last][::-1]
        last = first
        slots -= 1
        pages -= need
    return victims
