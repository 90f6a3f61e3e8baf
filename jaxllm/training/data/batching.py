"""Examples to rows and rows to batches, with all that waits held as numbers, so that the state is small and exact."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jaxllm.training.data.encode import Example, Sequence


@dataclass
class Piece:
    """An example (or the `part`-th part of a split one) that waits for its batch; `number` is its place in the stream."""

    number: int
    part: int
    example: Example

    @property
    def length(self) -> int:
        return max(len(sequence.ids) for sequence in self.example.sequences)


@dataclass
class Row:
    """One row of a batch to be."""

    pieces: list[Piece] = field(default_factory=list)
    used: int = 0

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.used += piece.length


class Packer:
    """First fit within a bounded window: a piece goes to the first open row where it fits; the oldest leaves when none has room."""

    def __init__(self, batch_size: int, max_length: int, window: int):
        self.batch_size, self.max_length, self.window = batch_size, max_length, window
        self.open: list[Row] = []
        self.ready: deque[Row] = deque()

    def add(self, piece: Piece) -> None:
        row = next((row for row in self.open if row.used + piece.length <= self.max_length), None)
        if row is None:
            if len(self.open) == self.window:
                self.ready.append(self.open.pop(0))
            row = Row()
            self.open.append(row)
        row.add(piece)
        if row.used == self.max_length:
            self.open.remove(row)
            self.ready.append(row)

    def take(self, end: bool = False) -> tuple[list[Row], int] | None:
        """(rows, length) of the next batch, if there are enough; at the `end`, the rest."""
        if end:
            self.ready.extend(self.open)
            self.open.clear()
        if len(self.ready) < (1 if end else self.batch_size):
            return None
        return [self.ready.popleft() for _ in range(min(self.batch_size, len(self.ready)))], self.max_length

    def groups(self) -> list[list[Row]]:
        return [self.open, list(self.ready)]

    def restore(self, groups: list[list[Row]]) -> None:
        self.open, self.ready = groups[0], deque(groups[1])


class Buckets:
    """Padding: rows of one example each, gathered by length, so that short ones are not padded to the longest."""

    def __init__(self, batch_size: int, lengths: list[int]):
        self.batch_size, self.lengths = batch_size, lengths
        self.waiting: list[list[Row]] = [[] for _ in lengths]

    def add(self, piece: Piece) -> None:
        row = Row()
        row.add(piece)
        self.waiting[next(i for i, length in enumerate(self.lengths) if piece.length <= length)].append(row)

    def take(self, end: bool = False) -> tuple[list[Row], int] | None:
        """As Packer.take."""
        for i, rows in enumerate(self.waiting):
            if len(rows) >= (1 if end else self.batch_size):
                self.waiting[i] = rows[self.batch_size :]
                return rows[: self.batch_size], self.lengths[i]
        return None

    def groups(self) -> list[list[Row]]:
        return self.waiting

    def restore(self, groups: list[list[Row]]) -> None:
        self.waiting = groups


def make_arrays(rows: list[list[Sequence]], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, each `[batch_size, length]`; rows beyond those given are empty (segment 0, weight 0).

    tokens, targets (the next token in the same segment, 0 where there is none), segment_ids (from 1, 0 is padding) and positions
    (from 0 in each segment) are int32, weights float32 (1 where the loss counts the target).
    """
    shape = (batch_size, length)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    arrays["weights"] = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        at = 0
        for segment, sequence in enumerate(row, 1):
            n = len(sequence.ids)
            here, shifted = slice(at, at + n), slice(at, at + n - 1)
            arrays["tokens"][i, here] = sequence.ids
            arrays["targets"][i, shifted] = sequence.ids[1:]
            arrays["weights"][i, shifted] = sequence.loss[1:]
            arrays["segment_ids"][i, here] = segment
            arrays["positions"][i, here] = np.arange(n)
            at += n
    return arrays
