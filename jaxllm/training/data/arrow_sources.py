"""Parquet files and Arrow files (the folders of Hugging Face datasets), read with pyarrow, which is optional."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import DataError


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: Parquet and Arrow files need pyarrow: pip install 'jaxllm[arrow]', or write the data as JSONL") from error
    return pyarrow


class _Groups:
    """A file that is read a group of rows at a time; the last group read stays in memory."""

    def __init__(self, file: Path):
        self.file = file
        self._opened: Any = None
        self._lock = threading.Lock()
        pyarrow = _pyarrow(file)
        try:
            self.ends = np.cumsum([0, *self._sizes()])
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file}: cannot be read ({error}): write it again") from error

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_opened", "_lock", "_group")}

    def __setstate__(self, state):
        self.__dict__.update(state, _opened=None, _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, index: int) -> str:
        return f"{self.file}: row {index}"

    def read(self, index: int) -> dict[str, Any]:
        which = int(np.searchsorted(self.ends, index, side="right")) - 1
        with self._lock:
            if getattr(self, "_group", (None, None))[0] != which:
                self._group = (which, self._load(which))
            group = self._group[1]
        row = group.slice(index - int(self.ends[which]), 1).to_pylist()[0]
        return {name: value for name, value in row.items() if value is not None}

    def _sizes(self) -> list[int]:
        raise NotImplementedError

    def _load(self, which: int) -> Any:
        raise NotImplementedError


class ParquetTable(_Groups):
    """A Parquet file, a row group at a time."""

    def _open(self) -> Any:
        if self._opened is None:
            self._opened = _pyarrow(self.file).parquet.ParquetFile(self.file, memory_map=True)
        return self._opened

    def _sizes(self) -> list[int]:
        metadata = self._open().metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def _load(self, which: int) -> Any:
        return self._open().read_row_group(which)


class ArrowTable(_Groups):
    """An Arrow file of record batches, in the stream format (as Hugging Face datasets writes) or the file format; memory-mapped."""

    def _open(self) -> Any:
        if self._opened is None:
            pyarrow = _pyarrow(self.file)
            with open(self.file, "rb") as stream:
                is_file = stream.read(6) == b"ARROW1"
            mapped = pyarrow.memory_map(str(self.file))
            table = (pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)).read_all()
            self._opened = table.to_batches()
        return self._opened

    def _sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._open()]

    def _load(self, which: int) -> Any:
        return self._open()[which]
