"""Reading safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes.

Headers are checked against the file here, so that a damaged file is named before anything is loaded.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.source import Index, TensorInfo
from jaxllm.errors import CheckpointError

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
INDEX_NAME = "model.safetensors.index.json"


class _Location(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsSource:
    """A Hugging Face folder: config.json with model.safetensors, or with shards and model.safetensors.index.json."""

    def __init__(self, folder: Path):
        """Raises one CheckpointError that lists everything wrong with the folder."""
        self.path = folder
        problems: list[str] = []
        self.config = _read_object(folder / "config.json", problems) or {}
        self._locations: dict[str, _Location] = {}
        index, single = folder / INDEX_NAME, folder / "model.safetensors"
        if index.exists() and single.exists():
            problems.append(f"it holds both {INDEX_NAME} and model.safetensors: remove the one that is not meant")
        elif index.exists():
            self._read_shards(index, problems)
        elif single.exists():
            self._add_file(single, problems)
        else:
            found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
            problems.append(f"neither model.safetensors nor {INDEX_NAME} is there (found only {found})")
        if problems:
            raise CheckpointError(f"The checkpoint {folder} cannot be used: {'; '.join(problems)}. Repair or download these files again.")
        self.tensors = {name: TensorInfo(place.shape, place.dtype.name) for name, place in self._locations.items()}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if name not in self._locations:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it holds {len(self._locations)} others.")
        place = self._locations[name]
        if 0 in place.shape:
            return np.empty(place.shape, place.dtype)[index or ()]
        if not index:
            # Read straight into the result: copying out of a map would hold the tensor twice.
            raw = np.fromfile(place.file, np.uint8, math.prod(place.shape) * place.dtype.itemsize, offset=place.offset)
            return raw.view(place.dtype).reshape(place.shape)
        # Only the pages that the slice touches are read; the copy lets go of the map.
        return np.array(np.memmap(place.file, mode="r", dtype=place.dtype, offset=place.offset, shape=place.shape)[index])

    def _read_shards(self, index: Path, problems: list[str]) -> None:
        content = _read_object(index, problems)
        if content is None:
            return
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            problems.append(f"{index.name} has no valid weight_map (tensor name -> file name)")
            return
        files = sorted(set(weight_map.values()))
        # A name with a folder in it could point anywhere on the disk.
        missing = [file for file in files if file != Path(file).name or not (index.parent / file).is_file()]
        if missing:
            problems.append(f"{len(missing)} of {len(files)} shards named in {index.name} are missing: {_some(missing)}")
        readable = {file for file in files if file not in missing and self._add_file(index.parent / file, problems)}
        in_shard = {name: place.file.name for name, place in self._locations.items()}
        absent = [f"{name} ({file})" for name, file in weight_map.items() if file in readable and in_shard.get(name) != file]
        if absent:
            problems.append(f"{len(absent)} tensors are not in the shard that {index.name} names: {_some(absent)}")
        unlisted = [name for name in in_shard if name not in weight_map]
        if unlisted:
            problems.append(f"{len(unlisted)} tensors are in a shard but not in {index.name}: {_some(unlisted)}")

    def _add_file(self, file: Path, problems: list[str]) -> bool:
        """Adds the tensors of one file; False, with the reason appended to `problems`, if it cannot be read."""
        try:
            locations = _read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            return False
        duplicates = [f"{name} (also in {self._locations[name].file.name})" for name in locations if name in self._locations]
        if duplicates:
            problems.append(f"{file.name} repeats tensors: {_some(duplicates)}")
        self._locations.update(locations)
        return True


def read_file(file: Path) -> dict[str, np.ndarray]:
    """All tensors of one safetensors file. Raises CheckpointError if it is damaged."""
    read = lambda place: np.fromfile(file, np.uint8, math.prod(place.shape) * place.dtype.itemsize, offset=place.offset)
    return {name: read(place).view(place.dtype).reshape(place.shape) for name, place in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, _Location]:
    """Where each tensor of one file lies. Raises CheckpointError, its text beginning with the file's name."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file.name} is truncated: {size} bytes, but its header alone needs {8 + length}")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_duplicates)
        header.pop("__metadata__", None)
        start = 8 + length
        places, end = {}, start
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{file.name} has tensor {name!r} of type {entry['dtype']}, which is not implemented")
            place = _Location(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
            if begin < 0 or min(place.shape, default=0) < 0 or stop - begin != math.prod(place.shape) * place.dtype.itemsize:
                raise CheckpointError(f"{file.name} has tensor {name!r} whose byte range [{begin}, {stop}) does not fit {entry['shape']}")
            places[name] = place
            end = max(end, start + stop)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.name} has a damaged header ({error!r}): not a safetensors file") from error
    if end > size:
        raise CheckpointError(f"{file.name} is truncated: its tensors need {end} bytes and it has {size}")
    return places


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"duplicate names {_some(repeated)}")
    return dict(pairs)


def _read_object(file: Path, problems: list[str]) -> dict[str, object] | None:
    """The JSON object in `file`; None, with the reason appended to `problems`, if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except OSError as error:
        problems.append(f"{file.name} cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{file.name} is not valid JSON ({error})")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{file.name} holds a JSON {type(content).__name__} where an object is expected")
    return None


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
