"""Tables of block sizes as data: what `measure.py` has found on a chip, as JSON, and what `ragged_paged_attention` takes as `tuned`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.ragged_paged_attention.tuning import GpuBlocks, TpuBlocks, Work, why_illegal

_FORMAT = 1
_KINDS = {"tpu": TpuBlocks, "gpu": GpuBlocks}


class Entry(NamedTuple):
    """The quickest blocks for some work: what a call of the op took with them, and what it took with the heuristic's."""

    work: Work
    blocks: TpuBlocks | GpuBlocks
    seconds: float
    heuristic_seconds: float


@dataclass(frozen=True)
class Table:
    """Block sizes measured on a device of `device_kind` (JAX's name): they are good for no other, though they compile."""

    device_kind: str
    entries: tuple[Entry, ...]

    @cached_property
    def _blocks(self) -> dict[Work, TpuBlocks | GpuBlocks]:
        return {entry.work: entry.blocks for entry in self.entries}

    def find(self, work: Work) -> TpuBlocks | GpuBlocks | None:
        return self._blocks.get(work)

    @property
    def digest(self) -> str:
        """Of all that programs depend on here: tables with the same digest compile to the same."""
        blocks = sorted((entry.work, tuple(entry.blocks)) for entry in self.entries)
        return hashlib.blake2b(repr(blocks).encode(), digest_size=16).hexdigest()

    def with_entries(self, entries: Iterable[Entry]) -> Table:
        """The table with other work added, and the same work replaced."""
        return Table(self.device_kind, tuple({entry.work: entry for entry in (*self.entries, *entries)}.values()))


def file_name(device_kind: str) -> str:
    """Of the table for a kind of device: `tpu-v6-lite.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def read_table(path: Path) -> Table:
    """Raises OSError, and ValueError for a file that is no table or has sizes that a kernel cannot have."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is {data['format']!r}, and this version reads {_FORMAT}")
        entries = tuple(_entry(_KINDS[data["platform"]], item) for item in data["entries"])
        table = Table(str(data["device_kind"]), entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of block sizes: {error!r}") from error
    for entry in table.entries:
        if reason := why_illegal(entry.work, entry.blocks):
            raise ValueError(f"{path}: {entry.work}: {reason}")
    return table


def _entry(kind: type, item: dict) -> Entry:
    work = Work(**item["work"])
    sizes = (work.heads, work.kv_heads, work.width, work.page_size)
    if work.kernel not in ("decode", "chunks") or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{work} is no work of the kernels'")
    return Entry(work, kind(**item["blocks"]), float(item["seconds"]), float(item["heuristic_seconds"]))


def write_table(table: Table, path: Path) -> None:
    """Whole or not at all: an engine may be reading. The folder is made if it is not there."""
    [platform] = {name for name, kind in _KINDS.items() if all(isinstance(entry.blocks, kind) for entry in table.entries)}
    entries = [entry._asdict() | {"work": entry.work._asdict(), "blocks": entry.blocks._asdict()} for entry in table.entries]
    data = {"format": _FORMAT, "device_kind": table.device_kind, "platform": platform, "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
    os.replace(staging, path)
