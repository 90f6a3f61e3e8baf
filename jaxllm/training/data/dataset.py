"""The iterator over batches: packs or pads what the stream draws, counts what it leaves out, and saves where it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from jaxllm.config import to_dict
from jaxllm.errors import ConfigError, DataError
from jaxllm.tokenizers import Tokenizer
from jaxllm.training.data.batching import Buckets, Packer, Piece, Row, make_arrays
from jaxllm.training.data.config import DataConfig
from jaxllm.training.data.encode import Example, Sequence
from jaxllm.training.data.stream import Drawn, Stream

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
# Settings that change no batch: how the reading is spread, and what a bad record does (those that were skipped are counted).
_FREE = ("workers", "read_threads")
_COUNTS = ("records", "examples", "tokens", "learned", "truncated", "split", "too_long", "bad_records", "nothing_to_learn")


def make_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Dataset:
    """An iterator over batches of `batch_size` rows (of this host) and at most `max_length` tokens a row.

    Text, completions and chats give {tokens, targets, weights, segment_ids, positions}, each `[B, T]` (see `make_arrays`); preference
    pairs {"chosen": batch, "rejected": batch} of equal shape; kto a batch with `labels` `[B]` bool. The last batch of the last epoch
    may have empty rows (segment 0, weight 0). Raises DataError or ConfigError.
    """
    return Dataset(config, tokenizer, batch_size, max_length, seed, shard_index, shard_count)


class Dataset(Iterator[Batch]):
    """Made by `make_dataset`. `get_state` after any batch, and `set_state` on another Dataset made alike: the very same batches follow.

    Attributes:
        family: "lm", "preference" or "kto": the shape of its batches.
        counts: what was drawn and left out until now, by name.
        stream: where the examples come from.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, batch_size: int, max_length: int, seed: int, shard_index: int, shard_count: int
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("shard_count", shard_count, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= shard_index < shard_count:
            raise ConfigError(f"shard_index is {shard_index}; with {shard_count} shards it must be from 0 to {shard_count - 1}")
        if shard_count > 1 and config.epochs is not None:
            raise ConfigError(
                "`epochs` with data split over hosts would end on them at different steps, and the others would wait for ever: "
                "set `epochs` to null and bound the run by steps, or let every host read everything (shard_count=1)"
            )
        if config.buckets and config.buckets[-1] > max_length:
            raise ConfigError(f"`buckets` go up to {config.buckets[-1]}, beyond max_length {max_length}: drop the longer ones")
        self.config, self.tokenizer = config, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.stream = Stream(config, tokenizer, seed=seed, shard_index=shard_index, shard_count=shard_count)
        families = {kind if kind in ("preference", "kto") else "lm" for kind in self.stream.kinds}
        if len(families) > 1:
            raise ConfigError(f"the sources hold records of kinds that do not mix in a batch ({', '.join(self.stream.kinds)}): take one")
        self.family = families.pop()
        if config.too_long == "split" and set(self.stream.kinds) != {"text"}:
            raise ConfigError(f"too_long=split parts plain text, and there is {', '.join(self.stream.kinds)}: use truncate or skip")
        self.packing = config.packing and self.family == "lm"
        if self.packing:
            self._rows: Packer | Buckets = Packer(batch_size, max_length, config.packing_window)
        else:
            self._rows = Buckets(batch_size, sorted({*config.buckets, max_length}))
        self._identity = self._describe(seed, shard_index, shard_count)
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.bad_records: list[str] = []
        self._position = 0
        self._idle = 0  # records in a row that gave nothing
        self._reader: Iterator[Drawn] | None = None

    def _describe(self, seed: int, shard_index: int, shard_count: int) -> dict[str, Any]:
        """What a state belongs to: a state of other data, or of other settings, would silently give other batches."""
        tokenizer = hashlib.sha256(self.tokenizer.backend.to_str().encode())
        tokenizer.update(json.dumps([self.tokenizer.special_tokens, self.tokenizer.chat_templates], sort_keys=True).encode())
        config = {name: value for name, value in to_dict(self.config).items() if name not in _FREE}
        return {
            **{f"data.{name}": value for name, value in config.items()},
            "records": self.stream.lengths,
            "kinds": self.stream.kinds,
            "tokenizer": tokenizer.hexdigest()[:16],
            **dict(batch_size=self.batch_size, max_length=self.max_length, seed=seed, shard_index=shard_index, shard_count=shard_count),
        }

    @property
    def epoch(self) -> float:
        """How many times the data was gone through, as a fraction; of a mixture: its records drawn by all the records there are."""
        return self._position / self.stream.pass_length

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Raises StopIteration after the last epoch, DataError for a bad record (unless they are skipped)."""
        while (taken := self._rows.take()) is None:
            if self._reader is None:
                self._reader = self.stream.read_from(self._position)
            drawn = next(self._reader, None)
            if drawn is None:
                taken = self._rows.take(end=True)
                if taken is None:
                    raise StopIteration
                break
            for piece in self._pieces(drawn, self._position):
                self._rows.add(piece)
            self._position += 1
        return self._batch(*taken)

    def _pieces(self, drawn: Drawn, number: int) -> list[Piece]:
        """What a drawn record gives; counted."""
        self.counts["records"] += 1
        pieces = []
        if drawn.error is not None:
            message = f"{drawn.where}: {drawn.error}"
            if self.config.on_bad_record == "error":
                raise DataError(f"{message}. (on_bad_record=skip leaves such records out and counts them)")
            self.counts["bad_records"] += 1
            if len(self.bad_records) < 20:
                self.bad_records.append(message)
                logger.warning("left out a bad record: %s", message)
        else:
            longest = max(len(sequence.ids) for sequence in drawn.example.sequences)
            if longest > self.max_length:
                self._count_long(drawn, longest)
            for part, example in self._fitting(drawn.example):
                if all(sequence.loss[1:].any() for sequence in example.sequences):
                    pieces.append(Piece(number, part, example))
                else:
                    self.counts["nothing_to_learn"] += 1
        self._idle = 0 if pieces else self._idle + 1
        if self._idle >= self.stream.pass_length:
            left_out = {name: self.counts[name] for name in ("bad_records", "too_long", "nothing_to_learn") if self.counts[name]}
            place = drawn.where
            raise DataError(f"{place}: none of {self._idle} records in a row could be used ({left_out}); the last: {self._why(drawn)}")
        return pieces

    def _why(self, drawn: Drawn) -> str:
        if drawn.error:
            return drawn.error
        return f"no token to learn is left within max_length={self.max_length}; check loss_on, and raise max_length if prompts are longer"

    def _count_long(self, drawn: Drawn, longest: int) -> None:
        if self.config.too_long == "error":
            fix = "raise max_length, or set too_long to truncate or skip"
            raise DataError(f"{drawn.where}: {longest} tokens, and a row holds max_length={self.max_length}: {fix}")
        self.counts[{"truncate": "truncated", "skip": "too_long", "split": "split"}[self.config.too_long]] += 1

    def _fitting(self, example: Example) -> list[tuple[int, Example]]:
        """`example` as rows can hold it: (part, example) pairs; without counting, for it is asked again on restoring."""
        size = self.max_length
        if all(len(sequence.ids) <= size for sequence in example.sequences):
            return [(0, example)]
        if self.config.too_long == "skip":
            return []
        if self.config.too_long == "truncate":
            return [(0, _cut(example, 0, size))]
        return [(part, _cut(example, at, at + size)) for part, at in enumerate(range(0, len(example.sequences[0].ids), size))]

    def _batch(self, rows: list[Row], length: int) -> Batch:
        def arrays(which: int) -> dict[str, np.ndarray]:
            return make_arrays([[piece.example.sequences[which] for piece in row.pieces] for row in rows], self.batch_size, length)

        batch: Batch = {"chosen": arrays(0), "rejected": arrays(1)} if self.family == "preference" else arrays(0)
        for part in batch.values() if self.family == "preference" else (batch,):
            self.counts["tokens"] += int((part["segment_ids"] > 0).sum())
            self.counts["learned"] += int(part["weights"].sum())
        self.counts["examples"] += sum(len(row.pieces) for row in rows)
        if self.family == "kto":
            batch["labels"] = np.zeros(self.batch_size, bool)
            batch["labels"][: len(rows)] = [row.pieces[0].example.label for row in rows]
        return batch

    def get_state(self) -> bytes:
        """Where the iterator is, as JSON: of what waits in rows it has the numbers, by which `set_state` draws the examples again."""
        groups = [[[[piece.number, piece.part] for piece in row.pieces] for row in rows] for rows in self._rows.groups()]
        state = {"version": 1, "position": self._position, "groups": groups, "idle": self._idle, "counts": self.counts}
        return json.dumps({**state, "bad_records": self.bad_records, "identity": self._identity}).encode()

    def set_state(self, state: bytes | str) -> None:
        """Continues from a `get_state`. Raises DataError if it belongs to other data or settings, naming what differs."""
        try:
            saved = json.loads(state)
            identity, version = saved["identity"], saved["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the saved place in the data cannot be read ({error}): start the data anew") from error
        if version != 1:
            raise DataError(f"the saved place in the data has version {version}, and this jaxllm reads version 1: use the other")
        ours = json.loads(json.dumps(self._identity))
        differing = [name for name in {**ours, **identity} if ours.get(name) != identity.get(name)]
        if differing:
            shown = "; ".join(f"{name} was {identity.get(name)!r} and is {ours.get(name)!r}" for name in differing[:3])
            raise DataError(f"the checkpoint's place in the data does not fit ({shown}): continue with the same data, or start it anew")
        drawn: dict[int, Example] = {}

        def piece(number: int, part: int) -> Piece:
            if number not in drawn:
                example = self.stream[number]
                if example.example is None:
                    raise DataError(f"{example.where}: {example.error}; it was well when the checkpoint was saved: restore the file")
                drawn[number] = example.example
            return Piece(number, part, dict(self._fitting(drawn[number]))[part])

        groups = []
        for rows in saved["groups"]:
            groups.append([Row() for _ in rows])
            for row, pieces in zip(groups[-1], rows, strict=True):
                for number, part in pieces:
                    row.add(piece(number, part))
        self._rows.restore(groups)
        self._position, self._idle = saved["position"], saved["idle"]
        self.counts, self.bad_records = saved["counts"], saved["bad_records"]
        self.close()

    def close(self) -> None:
        """Stops the worker processes; the next batch starts them again."""
        if self._reader is not None and hasattr(self._reader, "close"):
            self._reader.close()
        self._reader = None


def _cut(example: Example, start: int, stop: int) -> Example:
    cut = tuple(Sequence(sequence.ids[start:stop], sequence.loss[start:stop]) for sequence in example.sequences)
    return dataclasses.replace(example, sequences=cut)
