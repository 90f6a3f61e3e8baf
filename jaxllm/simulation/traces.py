"""Requests to simulate: traces that others have published.

Azure's traces of 2023 (Patel et al., arXiv 2311.18677) are CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake's (Qin et
al., arXiv 2407.00079) are JSON lines with timestamp in ms, input_length, output_length, and hash_ids: one for each 512 tokens
of the prompt, the same where all up to there is the same.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from jaxllm.errors import DataError

MOONCAKE_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of their arrivals.

    Attributes:
      arrivals: float64 [N], seconds.
      prompts, outputs: int64 [N], tokens, at least 1.
      blocks: for each request, names of its prompt's blocks of `block` tokens; None: no two begin alike.
      tenants, priorities: of each request; None: all alike.
    """

    arrivals: np.ndarray
    prompts: np.ndarray
    outputs: np.ndarray
    blocks: Sequence[Sequence[int]] | None = None
    block: int = MOONCAKE_BLOCK
    tenants: Sequence[str] | None = None
    priorities: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def rate(self) -> float:
        """Requests a second."""
        span = float(self.arrivals[-1] - self.arrivals[0]) if len(self) > 1 else 0.0
        return (len(self) - 1) / span if span > 0 else float("inf")

    def at_rate(self, rate: float) -> Trace:
        """The same, with time stretched or shrunk to so many requests a second."""
        start = self.arrivals[0] if len(self) else 0.0
        return replace(self, arrivals=(self.arrivals - start) * (self.rate / rate if np.isfinite(self.rate) else 1.0))

    def first(self, n: int) -> Trace:
        """The first n requests."""
        return self.part(0, n)

    def part(self, start: int, n: int) -> Trace:
        """n requests from the one of that number on."""
        cut = lambda column: None if column is None else column[start : start + n]
        columns = ("arrivals", "prompts", "outputs", "blocks", "tenants", "priorities")
        return replace(self, **{name: cut(getattr(self, name)) for name in columns})

    def scaled(self, factor: float) -> Trace:
        """With prompts, what they have in common, and outputs so many times as long, at least a token each."""
        tokens = lambda lengths: np.maximum(1, np.rint(lengths * factor)).astype(np.int64)
        return replace(self, prompts=tokens(self.prompts), outputs=tokens(self.outputs), block=max(1, round(self.block * factor)))

    def fitting(self, max_model_len: int) -> tuple[Trace, int]:
        """Without the requests of more tokens than a model takes, and how many those are."""
        keep = np.flatnonzero(self.prompts + self.outputs <= max_model_len)
        take = lambda column: column[keep] if isinstance(column, np.ndarray) else None if column is None else [column[i] for i in keep]
        columns = ("arrivals", "prompts", "outputs", "blocks", "tenants", "priorities")
        return replace(self, **{name: take(getattr(self, name)) for name in columns}), len(self) - len(keep)


def read_trace(path: str | Path) -> Trace:
    """A trace from a file, by its name's ending: .csv as Azure's, .jsonl as Mooncake's. Raises DataError."""
    path = Path(path)
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise DataError(f"{path}: a trace is a .csv file as Azure publishes them, or a .jsonl file as Mooncake does")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return _in_order(readers[path.suffix](file, path), path)
    except OSError as error:
        raise DataError(f"cannot read the trace {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8") from error


def _azure(file, path: Path) -> Trace:
    rows = csv.DictReader(file)
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if missing := [name for name in wanted if name not in (rows.fieldnames or ())]:
        raise DataError(f"{path}: there is no column {missing[0]}; Azure's traces have {', '.join(wanted)}")
    arrivals, prompts, outputs = [], [], []
    for number, row in enumerate(rows, 2):
        try:
            # Seven digits of a second are one more than datetime takes.
            day, _, fraction = row["TIMESTAMP"].partition(".")
            arrivals.append(datetime.fromisoformat(day + "+00:00").timestamp() + float("0." + (fraction or "0")))
            prompts.append(int(row["ContextTokens"]))
            outputs.append(int(row["GeneratedTokens"]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return Trace(np.array(arrivals), np.array(prompts, np.int64), np.array(outputs, np.int64))


def _mooncake(file, path: Path) -> Trace:
    arrivals, prompts, outputs, blocks = [], [], [], []
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
            arrivals.append(float(row["timestamp"]) / 1e3)
            prompts.append(int(row["input_length"]))
            outputs.append(int(row["output_length"]))
            blocks.append([int(i) for i in row.get("hash_ids", ())])
        except (TypeError, ValueError, KeyError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, line {number}: {what}") from error
    return Trace(np.array(arrivals), np.array(prompts, np.int64), np.array(outputs, np.int64), blocks)


def _in_order(trace: Trace, path: Path) -> Trace:
    if not len(trace):
        raise DataError(f"{path} has no requests")
    if (bad := np.flatnonzero((trace.prompts < 1) | (trace.outputs < 1))).size:
        raise DataError(f"{path}: request {bad[0] + 1} has {trace.prompts[bad[0]]} prompt and {trace.outputs[bad[0]]} output tokens")
    order = np.argsort(trace.arrivals, kind="stable")
    blocks = None if trace.blocks is None else [trace.blocks[i] for i in order]
    return replace(
        trace,
        arrivals=trace.arrivals[order] - trace.arrivals[order[0]],
        prompts=trace.prompts[order],
        outputs=trace.outputs[order],
        blocks=blocks,
    )
