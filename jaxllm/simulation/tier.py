"""Host memory behind the pages of a simulated device: pages of those who gave up their places move there and back.

Nothing that a preempted sequence has computed is lost while host memory has room for it: its pages stay on the device until others
need them (keep), are copied to the host before (swap), and computed again only where fetching would take longer (recompute).

`reactive`: a page is copied when another needs its place, and fetched when its sequence is admitted; the step waits. `proactive`, as
FastServe (Wu et al., arXiv 2305.05920, section 4.2): while steps run, pages are copied out and fetched ahead of need, by each
sequence's estimated next scheduled time (`estimated_turns`): who has longest to wait goes first, who is next comes back first. A step
waits for what has not arrived when it should begin. The link carries both directions at once, each at the host's bandwidth.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import takewhile
from typing import Literal

from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.policies import NEVER
from jaxllm.serving.scheduler import ScheduledSequence, Scheduler, SchedulerConfig, Sequence
from jaxllm.simulation.cost import CostModel

Swap = Literal["recompute", "reactive", "proactive"]
SWAPS: tuple[Swap, ...] = ("recompute", "reactive", "proactive")
_SPARE = 0.05  # of the device's pages are not filled ahead of need, for those who come


class TieredPool(PagePool):
    """Pages of which some are worth saving when they are taken from the device."""

    def __init__(self, num_pages: int, host_pages: int):
        super().__init__(num_pages)
        self.host_pages = host_pages
        self.host: OrderedDict[int, None] = OrderedDict()  # names of the pages that are there, the one that came first, first
        self.owner: dict[int, Sequence] = {}  # of the pages of those who wait after a preemption, by name
        self.turns: dict[Sequence, float] = {}  # when those are likely to be next
        self.late = 0  # pages that were taken before they had been copied

    def save(self, name: int) -> None:
        """Copies a page to the host; what came there first is dropped if there is no room."""
        self.host[name] = None
        if len(self.host) > self.host_pages:
            self.host.popitem(last=False)

    def victim(self) -> int:
        """The cached page to give up: of nobody who waits, the one used longest ago; else the last of who has longest to wait."""
        name, owner = self._name, self.owner
        page = next((page for page in self._cached if name[page] not in owner), None)
        if page is None:
            turns = self.turns
            page = max(self._cached, key=lambda page: (turns.get(owner[name[page]], NEVER), name[page]))
        return page

    def _evict(self) -> int:
        page = self.victim()
        del self._cached[page]
        name = self._name.pop(page)
        del self._page[name]
        if name in self.owner and name not in self.host:
            self.save(name)
            self.late += 1
        return page

    def unsaved(self) -> list[tuple[float, int]]:
        """(turn of its owner, name) of the pages on the device that are worth saving and have not been saved."""
        return [(self.turns.get(s, NEVER), name) for name, s in self.owner.items() if name in self._page and name not in self.host]

    def on_device(self, name: int) -> bool:
        return name in self._page


class SwappingScheduler(Scheduler):
    """The scheduler, with a host tier that the pages of those who give up their places go to."""

    pool: TieredPool

    def __init__(self, config: SchedulerConfig, num_pages: int, cost: CostModel, swap: Swap, host_bytes: float):
        self.page_s = config.page_size * cost.kv_token_bytes / cost.host_bandwidth
        self.page_bytes = config.page_size * cost.kv_token_bytes
        super().__init__(config, TieredPool(num_pages, int(min(host_bytes, 1e18) // self.page_bytes)))
        self.cost, self.ahead = cost, swap == "proactive"
        self.preempted: dict[Sequence, list[int]] = {}  # names of the pages of those who wait after a preemption
        self._fetching: dict[Sequence, int] = {}  # pages that who is admitted in this plan gets from the host
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
            "exposed_swap_s": self.exposed_s,
        }

    def begin(self, now: float, device_free: float) -> float:
        """When the step that has just been planned can begin: its pages have gone and come."""
        ready, pool = max(now, device_free), self.pool
        late, fetched = pool.late, sum(self._fetching.values())
        pool.late = 0
        self._fetching.clear()
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
                if not pool._free:
                    owner = pool.owner.get(pool._name[pool.victim()])
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

    def _find_computed(self, sequence: Sequence) -> int | None:
        copy_from = super()._find_computed(sequence)
        if sequence in self.preempted:
            size, names = self.config.page_size, sequence.page_names[: (sequence.num_tokens - 1) // self.config.page_size]
            found = sequence.num_computed // size
            fetched = sum(1 for _ in takewhile(self.pool.host.__contains__, names[found:]))
            if fetched and fetched * self.page_s < self.cost.prompt_s(fetched * size):
                sequence.num_computed += fetched * size
                self._fetching[sequence] = fetched
        return copy_from

    def _let_go(self, sequence: Sequence) -> None:
        self._fetching.pop(sequence, None)
        super()._let_go(sequence)

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
                self.pool.host.pop(name, None)
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
