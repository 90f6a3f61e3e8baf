"""Host memory behind the pages of a simulated device: pages of those who gave up their places move there and back.

Nothing that a preempted sequence has computed is lost while host memory has room for it: its pages stay on the device until others
need them (keep), are copied to the host before (swap), and computed again only where fetching would take longer (recompute).

`reactive`: a page is copied when another needs its place, and fetched when its sequence is admitted; the step waits. `proactive`, as
FastServe (Wu et al., arXiv 2305.05920, section 4.2): while steps run, pages are copied out and fetched ahead of need, by each
sequence's estimated next scheduled time (`estimated_turns`): who has longest to wait goes first, who is next comes back first. A step
waits for what has not arrived when it should begin. The link carries both directions at once, each at the host's bandwidth.
"""

from __future__ import annotations

from typing import Literal

from jaxllm.serving.host_tier import TieredPool
from jaxllm.serving.policies import NEVER
from jaxllm.serving.scheduler import ScheduledSequence, Scheduler, SchedulerConfig, Sequence, StepPlan
from jaxllm.simulation.cost import CostModel

Swap = Literal["recompute", "reactive", "proactive"]
SWAPS: tuple[Swap, ...] = ("recompute", "reactive", "proactive")
_SPARE = 0.05  # of the device's pages are not filled ahead of need, for those who come


class SwapPool(TieredPool):
    """Of those who wait after a preemption alone pages are worth saving when they are taken from the device."""

    def __init__(self, num_pages: int, host_pages: int):
        super().__init__(num_pages, host_pages)
        self.owner: dict[int, Sequence] = {}  # of the pages of those who wait after a preemption, by name
        self.turns: dict[Sequence, float] = {}  # when those are likely to be next

    def victim_owner(self) -> Sequence | None:
        """Whose page is taken next, if it is that of one who waits."""
        return self.owner.get(self._name[self._victim()])

    def _victim(self) -> int:
        """The cached page to give up: of nobody who waits, the one used longest ago; else the last of who has longest to wait."""
        name, owner = self._name, self.owner
        page = next((page for page in self._cached if name[page] not in owner), None)
        if page is None:
            turns = self.turns
            page = max(self._cached, key=lambda page: (turns.get(owner[name[page]], NEVER), name[page]))
        return page

    def worth_saving(self, name: int) -> bool:
        return name in self.owner

    def unsaved(self) -> list[tuple[float, int]]:
        """(turn of its owner, name) of the pages on the device that are worth saving and have not been saved."""
        return [(self.turns.get(s, NEVER), name) for name, s in self.owner.items() if name in self._page and name not in self.host]


class SwappingScheduler(Scheduler):
    """The scheduler, with a host tier that the pages of those who give up their places go to."""

    pool: SwapPool

    def __init__(self, config: SchedulerConfig, num_pages: int, cost: CostModel, swap: Swap, host_bytes: float):
        self.page_s = config.page_size * cost.kv_token_bytes / cost.host_bandwidth
        self.page_bytes = config.page_size * cost.kv_token_bytes
        super().__init__(config, SwapPool(num_pages, int(min(host_bytes, 1e18) // self.page_bytes)))
        self.cost, self.ahead = cost, swap == "proactive"
        self.preempted: dict[Sequence, list[int]] = {}  # names of the pages of those who wait after a preemption
        self._in_free = self._out_free = 0.0  # when the link has done what it was told
        self.pages_in = self.pages_out = 0
        self.exposed_s = 0.0

    @property
    def settled(self) -> bool:
        """Steps are taken one by one while pages may move."""
        return not self.preempted and super().settled

    def figures(self) -> dict[str, float]:
        """What moved, and for how long steps waited for it (`Outcome`)."""
        return {
            "swapped_in_bytes": self.pages_in * self.page_bytes,
            "swapped_out_bytes": self.pages_out * self.page_bytes,
            "swap_s": (self.pages_in + self.pages_out) * self.page_s,
            "exposed_swap_s": self.exposed_s,
        }

    def begin(self, plan: StepPlan, now: float, device_free: float) -> float:
        """When a step that has just been planned can begin: its pages have gone and come."""
        ready, late, fetched = max(now, device_free), len(plan.saves), len(plan.fetches)
        self.pages_out += late
        self.pages_in += fetched
        start = ready
        if self.ahead:
            if late:
                start = self._out_free = max(now, self._out_free) + late * self.page_s
            if fetched:
                self._in_free = max(now, self._in_free) + fetched * self.page_s
                start = max(start, self._in_free)
        else:
            start += (late + fetched) * self.page_s
        self.exposed_s += max(0.0, start - ready)
        return max(start, ready)

    def meanwhile(self, now: float, until: float) -> None:
        """Moves pages ahead of need while the device computes."""
        if not self.ahead or not self.preempted:
            return
        pool = self.pool
        pool.turns = estimated_turns(self, now)
        self._out_free, self._in_free = max(now, self._out_free), max(now, self._in_free)
        if (room := int((until - self._out_free) / self.page_s)) > 0:
            saved = sorted(pool.unsaved(), reverse=True)[:room]
            for _, name in saved:
                pool.save(name)
            self.pages_out += len(saved)
            self._out_free += len(saved) * self.page_s
        if (room := int((until - self._in_free) / self.page_s)) > 0:
            fetched = self._fetch_ahead(room)
            self.pages_in += fetched
            self._in_free += fetched * self.page_s

    def _fetch_ahead(self, room: int) -> int:
        """Brings pages of who is next back, while none is in the way of it whose turn comes sooner. Returns how many."""
        pool, fetched, spare = self.pool, 0, int(_SPARE * self.pool.num_pages)
        for sequence in sorted(self.preempted, key=lambda s: pool.turns[s]):
            for name in self.preempted[sequence]:
                if pool.on_device(name):
                    continue
                if fetched == room or name not in pool.host or self.num_unpromised <= spare:
                    return fetched
                if not pool.num_empty:
                    owner = pool.victim_owner()
                    if owner is not None and pool.turns.get(owner, NEVER) <= pool.turns[sequence]:
                        return fetched
                (page,) = pool.take(1)
                pool.publish(page, name)
                pool.give_back([page])
                fetched += 1
        return fetched

    def _preempt(self, sequence: Sequence) -> None:
        names = sequence.page_names[: sequence.num_published]
        self.preempted[sequence] = names
        self.pool.owner.update((name, sequence) for name in names)
        super()._preempt(sequence)

    def _num_to_fetch(self, sequence: Sequence, names: list[int]) -> int:
        n = super()._num_to_fetch(sequence, names) if sequence in self.preempted else 0
        return n if n * self.page_s < self.cost.prompt_s(n * self.config.page_size) else 0

    def _plan(self, sequence: Sequence, count: int, admitted: bool = False) -> ScheduledSequence:
        if admitted and sequence in self.preempted:
            for name in self.preempted.pop(sequence):
                self.pool.owner.pop(name, None)
        return super()._plan(sequence, count, admitted)

    def finish(self, id: int) -> None:
        sequence = self._by_id.get(id)
        if sequence is not None and sequence.preemptions:
            self.preempted.pop(sequence, None)
            for name in sequence.page_names:
                self.pool.owner.pop(name, None)
                self.pool.drop(name)
        super().finish(id)


def estimated_turns(scheduler: Scheduler, now: float) -> dict[Sequence, float]:
    """ENST (section 4.2): for each who waits, the seconds until its promotion or, if that is sooner, until all before it have run their
    quanta, a batch at a time. Policies without queues have quanta of a second: then the order is that of their ranks."""
    policy, batch = scheduler.policy, scheduler.config.max_num_seqs
    ahead, turns = sum(policy.turn_left(s) for s in scheduler.running), {}
    for s in scheduler.waiting:
        turns[s] = min(policy.promoted(s) - now, ahead / batch)
        ahead += policy.turn_left(s)
    return turns
