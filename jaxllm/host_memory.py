"""The process's own memory."""

import ctypes
from functools import cache


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
