"""The process's own memory."""

import ctypes
import re
import threading
from functools import cache
from pathlib import Path

import psutil


@cache
def _malloc_trim():
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's; other C libraries return what is freed by themselves, or have no such call
    except (OSError, AttributeError, TypeError):
        return None


def trim() -> None:
    """Gives the system back what the process has freed: compiling leaves some tens of megabytes a program in glibc's arenas."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def total_bytes() -> int:
    """What this process may use of the machine's memory: a container's limit can be far below what there is."""
    total = psutil.virtual_memory().total
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def own_bytes() -> int:
    """What the process has that no other has, and that the system cannot read anew from a file: its anonymous pages. All that is resident
    where the system does not tell them apart."""
    try:
        anonymous = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        anonymous = None
    return psutil.Process().memory_info().rss if anonymous is None else int(anonymous[1]) << 10


class PeakMemory:
    """The most that `own_bytes` were between entering and leaving, looked at a hundred times a second: `bytes`."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._end = own_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jaxllm-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, own_bytes())

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self.bytes = max(self.bytes, own_bytes())
