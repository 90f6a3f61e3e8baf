"""Host memory behind the KV cache's pages.

What a page holds is copied to host memory when its place is taken (`StepPlan.saves`), and copied back when a sequence is admitted that
begins with it (`StepPlan.fetches`), in place of being computed again. Pages of those who gave up their places and pages that the prefix
cache would have forgotten are one thing: both go by their names. The same idea with requests for pages is FastServe's swapping (Wu et
al., arXiv 2305.05920, section 4.2), whose copies ahead of need the simulator has (`simulation/tier.py`).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from jaxllm.serving.kv_cache import PagePool


class TieredPool(PagePool):
    """A pool that remembers what has been copied to host memory, and where there: each page has a slot, until it is the one that was
    used longest ago and another needs the room."""

    def __init__(self, num_pages: int, host_pages: int):
        super().__init__(num_pages)
        self.host_pages = host_pages
        self.host: OrderedDict[bytes, int] = OrderedDict()  # slots by name, the one used longest ago first
        self._empty: list[int] = []  # slots that have been in use
        self._saves: list[tuple[int, int]] = []
        self._pinned: set[int] = set()  # slots that are read in the step to come

    @property
    def num_empty(self) -> int:
        """Pages that can be taken without forgetting what any holds."""
        return len(self._free)

    def on_device(self, name: bytes) -> bool:
        return name in self._page

    def on_host(self, names: Sequence[bytes]) -> int:
        return sum(1 for _ in takewhile(self.host.__contains__, names))

    def fetch(self, name: bytes, page: int) -> tuple[int, int]:
        """(slot, page) to copy from host memory before the step: a page that has been taken becomes that of this name."""
        self.host.move_to_end(name)
        self.publish(page, name)
        return self.host[name], page

    def pin(self, names: Sequence[bytes]) -> None:
        """Those stay in host memory until the next `take_saves`."""
        self._pinned.update(self.host[name] for name in names)

    def take_saves(self) -> tuple[tuple[int, int], ...]:
        """(page, slot) of the pages to copy to host memory before the step, since this was last asked."""
        saves = tuple(self._saves)
        self._saves.clear()
        self._pinned.clear()
        return saves

    def save(self, name: bytes) -> int | None:
        """A slot for a page: an empty one, or that which was used longest ago; None if there is none to have."""
        if len(self.host) < self.host_pages:
            slot = self._empty.pop() if self._empty else len(self.host)
        else:
            old = next((name for name, slot in self.host.items() if slot not in self._pinned), None)
            if old is None:
                return None
            slot = self.host.pop(old)
        self.host[name] = slot
        return slot

    def drop(self, name: bytes) -> None:
        """Forgets what host memory has under a name, if it has anything."""
        if (slot := self.host.pop(name, None)) is not None:
            self._empty.append(slot)

    def forget(self) -> None:
        super().forget()
        for name in list(self.host):
            self.drop(name)

    def worth_saving(self, name: bytes) -> bool:
        return True

    def _evicted(self, page: int, name: bytes) -> None:
        if name in self.host:
            self.host.move_to_end(name)
        elif self.worth_saving(name) and (slot := self.save(name)) is not None:
            self._saves.append((page, slot))
