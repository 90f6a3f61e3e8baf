"""The endless (or once-through) order of examples, by number: a grain dataset that shuffles, mixes, shards and works ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import DataError
from jaxllm.tokenizers import Tokenizer
from jaxllm.training.data.config import DataConfig
from jaxllm.training.data.encode import Encoder, Example
from jaxllm.training.data.records import detect_kind, renamed
from jaxllm.training.data.sources import Table, open_table


@dataclass
class Drawn:
    """What came of a record: an example, or what is wrong with it; and where it stands."""

    where: str
    example: Example | None = None
    error: str | None = None


class _References:
    """The records of one source as (source, record) pairs, for grain to order; nothing is read."""

    def __init__(self, source: int, length: int):
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, int(index)


class _Draw:
    """(source, record) to Drawn. Errors travel as values: an exception would leave a worker process without its type."""

    def __init__(self, tables: list[Table], kinds: list[str], columns: list[dict[str, str]], encoder: Encoder):
        self.tables, self.kinds, self.columns, self.encoder = tables, kinds, columns, encoder

    def __call__(self, reference: tuple[int, int]) -> Drawn:
        source, index = reference
        table = self.tables[source]
        where = table.where(index)
        try:
            record = renamed(table.read(index), self.columns[source])
            return Drawn(where, self.encoder(record, self.kinds[source]))
        except DataError as error:
            return Drawn(where, error=str(error))


class Stream:
    """Examples by number 0, 1, ...: `read_from(n)` gives them in order, `self[n]` any one, always the same.

    Of `shard_count` hosts, host `shard_index` has every shard_count-th example of one common order.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, seed: int, shard_index: int, shard_count: int):
        import grain

        self.config = config
        tables = [open_table(source) for source in config.all_sources]
        self.kinds = [_kind(table, source) for table, source in zip(tables, config.all_sources, strict=True)]
        self.lengths = [len(table) for table in tables]
        self.epoch_length = None if config.sources and config.sources[0].weight is not None else sum(self.lengths)
        parts = [grain.MapDataset.source(_References(i, length)) for i, length in enumerate(self.lengths)]
        if self.epoch_length is None:
            if config.shuffle:
                parts = [part.shuffle(seed=seed + i) for i, part in enumerate(parts)]
            weights = [source.weight for source in config.sources]
            order = grain.MapDataset.mix([part.repeat() for part in parts], weights=weights)
        else:
            order = grain.MapDataset.concatenate(parts)
            if config.shuffle:
                order = order.shuffle(seed=seed)
            order = order.repeat(config.epochs)
        self.shard = (shard_index, shard_count)
        draw = _Draw(tables, self.kinds, [source.columns for source in config.all_sources], Encoder(tokenizer, config))
        self.order = order.map(draw)
        # Numbers of this host's examples run below this.
        self.length = None if config.epochs is None else len(range(shard_index, self.epoch_length * config.epochs, shard_count))
        self.pass_length = max(1, -(-sum(self.lengths) // shard_count))

    def __getitem__(self, number: int) -> Drawn:
        index, count = self.shard
        return self.order[index + number * count]

    def read_from(self, number: int) -> Iterator[Drawn]:
        """The examples from `number` on; reads and tokenises ahead."""
        import grain

        if self.length is not None and number >= self.length:
            return iter(())
        index, count = self.shard
        threads, workers = self.config.read_threads, self.config.workers
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16 * threads)
        ahead = self.order.slice(slice(index + number * count, None, count)).to_iter_dataset(options)
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain asks for absl's flags, which nobody parses here
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16))
        return iter(ahead)


def _kind(table: Table, source: Any) -> str:
    if source.kind != "auto":
        return source.kind
    problem = None
    for index in range(min(len(table), 100)):  # broken lines at the top are reported when they are drawn
        try:
            return detect_kind(renamed(table.read(index), source.columns))
        except DataError as error:
            problem = problem or DataError(f"{table.where(index)}: {error}")
    raise problem
