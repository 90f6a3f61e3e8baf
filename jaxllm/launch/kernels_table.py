"""What `jaxllm kernels` found, as tables: on the terminal, and in a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.planning.kernels import KernelCase, KernelReport

MIB = 2**20


def table(reports: Sequence[KernelReport], chips: Sequence[str], cell: Callable[[KernelReport], str]) -> list[list[str]]:
    """A row a case: its name, and a cell a chip."""
    by_case: dict[KernelCase, dict[str, KernelReport]] = {}
    for report in reports:
        by_case.setdefault(report.case, {})[report.chip] = report
    return [[str(case), *(cell(row[chip]) for chip in chips)] for case, row in by_case.items()]


def summary(reports: Sequence[KernelReport], chips: Sequence[str]) -> list[list[str]]:
    """A row for each type and head_dim: how many cases compiled for a chip, of how many."""
    groups: dict[str, dict[str, list[KernelReport]]] = {}
    for report in reports:
        case = report.case
        name = f"{case.dtype} x {case.head_dim}" + (f", {case.kv_dtype} cache" if case.kv_dtype else "")
        groups.setdefault(name, {chip: [] for chip in chips})[report.chip].append(report)

    def cell(of: list[KernelReport]) -> str:
        xla = sum(r.reason is not None for r in of)
        return f"{sum(r.problem is None for r in of) - xla} of {len(of)}" + (f", {xla} xla" if xla else "")

    return [[name, *(cell(row[chip]) for chip in chips)] for name, row in groups.items()]


def seconds(report: KernelReport) -> str:
    return "no" if report.problem else "xla" if report.reason else f"{report.compile_s:.1f} s"


def moved(report: KernelReport) -> str:
    return "no" if report.problem else "xla" if report.reason else f"{report.bytes_moved / MIB:.0f}"


def reasons(reports: Sequence[KernelReport]) -> list[str]:
    return list(dict.fromkeys(f"xla: {r.chip}: {r.reason}" for r in reports if r.reason))


def print_table(reports: Sequence[KernelReport], chips: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("ragged paged attention")
    for chip in chips:
        shown.add_column(chip, justify="right")
    for row in table(reports, chips, seconds):
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for reason in reasons(reports):
        console.print(reason)


def markdown(reports: Sequence[KernelReport], chips: Sequence[str], *, every: bool) -> str:
    """The table of a page. In it are bytes, which the same compiler always makes the same; seconds it does not."""
    rows = summary(reports, chips) if every else table(reports, chips, moved)
    said = "cases compiled" if every else "MiB that a call moves"
    lines = [["ragged paged attention; " + said, *chips], ["---", *("---:" for _ in chips)], *rows]
    made = [r for r in reports if r.problem is None and r.reason is None]
    notes = [f"Temporaries: {max(r.temporaries for r in made) / MIB:.1f} MiB at most."] if made else []
    notes += reasons(reports)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "  \n".join(notes) + "\n"


def write_markdown(path: Path, command: str, text: str) -> None:
    """Puts the table in a page, in place of what the same command put there before; at its end if none did."""
    start, end = f"<!-- {command} -->", "<!-- end -->"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"{start}\n{text}{end}"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.S)
    page = pattern.sub(lambda _: block, page) if pattern.search(page) else f"{page}\n{block}\n".lstrip()
    path.write_text(page, encoding="utf-8")
