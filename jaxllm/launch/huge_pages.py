"""Memory in pages of 2 MiB for what computes on the CPU."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this process again, as it was started, with glibc asking Linux for huge pages; returns where that is so, or of no use.

    XLA's CPU backend takes a step's memory from the system anew each time, some gigabytes in training. In pages of 4 KiB that is a
    million page faults, which take as long as the products. glibc reads its settings when a process starts, and only then. To be
    called before anything is imported or opened that a second start would do again.
    """
    try:
        mode, libc = _MODE.read_text(), os.confstr("CS_GNU_LIBC_VERSION")
    except (OSError, ValueError, AttributeError):  # not Linux, or another C library
        return
    tunables = with_huge_pages(os.environ, mode, libc)
    if tunables is not None and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": tunables})


def with_huge_pages(environ: Mapping[str, str], mode: str, libc: str | None) -> str | None:
    """The GLIBC_TUNABLES to start with; None where the environment says already what it wants of huge pages, where the system gives
    them to all or to none (`mode`, Linux's own line of the three, with brackets about the one in force), or glibc is before 2.35."""
    given = environ.get("GLIBC_TUNABLES", "")
    name, _, version = (libc or "").partition(" ")
    digits = version.split(".")
    known = name == "glibc" and len(digits) >= 2 and all(map(str.isdigit, digits[:2])) and (int(digits[0]), int(digits[1])) >= (2, 35)
    if _TUNABLE in given or "[madvise]" not in mode or not known:
        return None
    return ":".join(part for part in (given, f"{_TUNABLE}=1") if part)
