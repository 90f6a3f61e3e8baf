"""Files as tables of records that are read by number, in any order, from several threads and processes."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxllm.errors import DataError
from jaxllm.training.data.config import DataSource

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".txt": "text",
    ".text": "text",
    ".arrow": "arrow",
}


class Table(Protocol):
    """Records by number. `read` raises DataError for a record that is broken; `where` names its place for a user."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str: ...


def open_table(source: DataSource) -> Table:
    """The records of `source`, `start` and `stop` applied. Raises DataError if there is no such file, or no record in it."""
    kind, files = find_files(source)
    if kind in ("parquet", "arrow"):
        from jaxllm.training.data.arrow_sources import ArrowTable, ParquetTable

        tables = [(ParquetTable if kind == "parquet" else ArrowTable)(file) for file in files]
    elif kind == "array_record":
        tables = [ArrayRecordTable(file) for file in files]
    elif kind == "jsonl":
        tables = [JsonLines(file) for file in files]
    else:
        tables = [TextFile(file, source.text_by) for file in files]
    joined = Joined(tables, source)
    if not len(joined):
        chosen = "" if (source.start, source.stop) == (0, None) else f" from start={source.start} to stop={source.stop}"
        raise DataError(f"{source.path}: no records{chosen}; check the path, and that the file is not empty")
    return joined


def find_files(source: DataSource) -> tuple[str, list[Path]]:
    """(format, files in sorted order). Raises DataError."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
            raise DataError(f"{path} holds several splits: name one, such as {path / (splits[0] if splits else 'train')}")
        if (path / "state.json").exists():
            return "arrow", _saved_dataset(path)
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
        if source.format == "auto":
            files = [file for file in files if file.suffix in _ENDINGS]
        hint = f"it has no file that ends in {' '.join(_ENDINGS)}; name the format and the files"
    elif path.exists():
        files, hint = [path], ""
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        hint = "there is no such file or folder" if not glob.has_magic(str(path)) else "no file matches"
    if not files:
        raise DataError(f"{source.path}: {hint}")
    if source.format != "auto":
        return source.format, files
    formats = {file: _ENDINGS.get(file.suffix) for file in files}
    for file, found in formats.items():
        if found is None:
            common = file.suffix in (".json", ".gz", ".zst", ".csv", ".tsv")
            fix = "write it as .jsonl, one JSON object a line" if common else "say `format`"
            raise DataError(f"{file}: the ending {file.suffix!r} tells no format that is read here ({' '.join(_ENDINGS)}): {fix}")
    if len(set(formats.values())) > 1:
        raise DataError(f"{source.path} holds files of several formats ({', '.join(sorted(set(formats.values())))}): name one sort")
    return formats[files[0]], files


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder that `datasets.Dataset.save_to_disk` wrote, in its order."""
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{folder} was saved with a separate file of indices: save it again with a current version of datasets")
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    for file in files:
        if not file.exists():
            raise DataError(f"{folder}: state.json names {file.name}, which is missing; copy the whole folder again")
    return files


class Joined:
    """Several tables end to end, `start` and `stop` applied."""

    def __init__(self, tables: list[Table], source: DataSource):
        self.tables = tables
        self.ends = np.cumsum([len(table) for table in tables])
        self.range = range(int(self.ends[-1]))[source.start : source.stop]

    def __len__(self) -> int:
        return len(self.range)

    def _find(self, index: int) -> tuple[Table, int]:
        number = self.range[index]
        which = int(np.searchsorted(self.ends, number, side="right"))
        return self.tables[which], number - (int(self.ends[which - 1]) if which else 0)

    def read(self, index: int) -> dict[str, Any]:
        table, number = self._find(index)
        return table.read(number)

    def where(self, index: int) -> str:
        table, number = self._find(index)
        return table.where(number)


class _Pieces:
    """A file of byte ranges, each a record: opened where it is used, so that threads and processes share no position."""

    def __init__(self, file: Path):
        self.file = file
        self._descriptor: int | None = None
        try:
            self.size = file.stat().st_size
            self.starts, self.stops, self.lines = self._index()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First byte, one past the last byte, and number of the first line of every record; empty lines are none."""
        starts, stops, lines = [], [], []
        at = 0
        with open(self.file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    starts.append(at)
                    stops.append(at + len(line))
                    lines.append(number)
                at += len(line)
        return np.array(starts, np.int64), np.array(stops, np.int64), np.array(lines, np.int64)

    def __getstate__(self):
        return {**self.__dict__, "_descriptor": None}

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        return f"{self.file}: line {self.lines[index]}"

    def text(self, index: int) -> str:
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.file, os.O_RDONLY)
            start, stop = int(self.starts[index]), int(self.stops[index])
            if os.fstat(self._descriptor).st_size != self.size:
                raise DataError(f"{self.file} changed while it was being read: leave training files alone during a run, and start again")
            data = os.pread(self._descriptor, stop - start, start)
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror})") from error
        try:
            return data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise DataError(f"byte {error.start} of the record is not UTF-8 text: convert the file to UTF-8") from error


class JsonLines(_Pieces):
    """One JSON object a line."""

    def read(self, index: int) -> dict[str, Any]:
        return parse_object(self.text(index))


class TextFile(_Pieces):
    """Plain text: a record is a line, a paragraph or the whole file, as `{"text": ...}`."""

    def __init__(self, file: Path, by: str):
        self.by = by
        super().__init__(file)

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, stops, lines = super()._index()
        if self.by == "line" or not len(starts):
            return starts, stops, lines
        if self.by == "file":
            return starts[:1], stops[-1:], lines[:1]
        first = np.flatnonzero(np.diff(lines, prepend=lines[0] - 2) > 1)
        return starts[first], stops[np.append(first[1:], len(stops)) - 1], lines[first]

    def read(self, index: int) -> dict[str, Any]:
        return {"text": re.sub(r"\r?\n\Z", "", self.text(index))}


class ArrayRecordTable:
    """An ArrayRecord file whose records are JSON objects in UTF-8."""

    def __init__(self, file: Path):
        from grain.sources import ArrayRecordDataSource

        self.file = file
        try:
            self.source = ArrayRecordDataSource(str(file))
            self.length = len(self.source)
        except Exception as error:  # the reader raises errors of several kinds, all of which mean this
            raise DataError(f"{file}: not a whole ArrayRecord file ({error}): write it again") from error

    def __len__(self) -> int:
        return self.length

    def where(self, index: int) -> str:
        return f"{self.file}: record {index}"

    def read(self, index: int) -> dict[str, Any]:
        try:
            return parse_object(self.source[index].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError("the record is not UTF-8 text: ArrayRecord records are read as JSON objects") from error


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises DataError saying where in the line it goes wrong."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = ""
        if text.strip() in ("[", "{") or text.lstrip().startswith("[{"):
            hint = "; the file seems to be one JSON document: write each record on a line of its own"
        raise DataError(f"not valid JSON ({detail}){hint or ': correct the line, or remove it'}") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object with keys, got a {type(record).__name__}: write each record as one object a line")
    return record
