"""GGUF files: metadata and tensors, read lazily and dequantised with numpy.

The header is parsed here (with `struct` over a memory map) because `gguf.GGUFReader` walks arrays element by element and takes seconds
for a large vocabulary; the block layouts of the quantised types come from `gguf.quants`.
Format: the GGUF specification in ggml's `docs/gguf.md`.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError

# GGML type number -> (name, values in a block, bytes in a block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_PIECE_BYTES = 1 << 16  # of quantised blocks
_PLAIN_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

# GGUF metadata value type -> numpy dtype; strings and arrays are handled apart.
_VALUE_DTYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is row-major (numpy's and Hugging Face's order); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """What `GGUFFile.read` returns: quantised blocks become float32."""
        return _PLAIN_DTYPES.get(self.type, np.dtype("<f4"))

    @property
    def quantized(self) -> bool:
        return self.type not in _PLAIN_DTYPES


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file. Metadata values are plain Python; arrays of strings are lists, arrays of numbers are numpy arrays."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, GGUFTensor]

    def read(self, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """The tensor, or `rows` of its first axis, dequantised: float32, float16 or bfloat16. Reads only those rows from disk."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it holds {len(self.tensors)} others.")
        tensor = self.tensors[name]
        # Blocks lie along the last axis, so every other axis can be cut before dequantising.
        leading = tensor.shape[:-1]
        blocks = np.memmap(self.path, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(*leading, tensor.nbytes // math.prod(leading)))
        if rows is not None and leading:
            blocks, rows = blocks[rows], None
        if tensor.type in _PLAIN_DTYPES:
            values = np.array(blocks).view(tensor.dtype)
        elif blocks.size == 0:
            values = np.empty((*blocks.shape[:-1], tensor.shape[-1]), np.float32)
        else:
            values = _dequantize(blocks, tensor)
        return values if rows is None else values[rows]


def _dequantize(blocks: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """float32 values of quantised rows. In pieces that fit the cache: gguf's own loop takes 16 rows at a time, mostly overhead."""
    from gguf import quants

    layout = getattr(quants, tensor.type)  # gguf has a class for each type
    rows = blocks.reshape(-1, blocks.shape[-1])
    values = np.empty((len(rows), tensor.shape[-1]), np.float32)
    step = max(1, _PIECE_BYTES // rows.shape[-1])
    for start in range(0, len(rows), step):
        values[start : start + step] = layout.dequantize_rows(np.array(rows[start : start + step]))
    return values.reshape(*blocks.shape[:-1], tensor.shape[-1])


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file, checking its whole header. Opening the same unchanged file again is free.

    Raises CheckpointError if the file is missing, truncated, not GGUF, big-endian, split, or holds a tensor type that is not implemented.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"Cannot open the GGUF file {path}: {error.strerror}. Check the path and its permissions.") from error
    return _open(path.absolute(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _open(path: Path, mtime_ns: int, size: int) -> GGUFFile:
    try:
        with open(path, "rb") as file:
            if size < 24:
                raise CheckpointError(f"{path} is only {size} bytes: not a complete GGUF file. Download or convert it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _Header(path, data).parse()
    except OSError as error:
        raise CheckpointError(f"Cannot read the GGUF file {path}: {error.strerror}. Check its permissions.") from error
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(tensors))


class _Header:
    """A cursor over the header of a GGUF file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def parse(self) -> tuple[dict[str, object], dict[str, GGUFTensor]]:
        if (magic := self.take(4)) != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it starts with {magic!r} where b'GGUF' was expected.")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self.path} is a big-endian GGUF file, which is not implemented: convert it with gguf-convert-endian.")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} has GGUF version {version}; versions 2 and 3 are implemented. Convert the model again.")
        tensor_count, key_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, object] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        if metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{self.path} is one of {metadata['split.count']} parts of a split GGUF model, which is not implemented: "
                "join them with `llama-gguf-split --merge FIRST_PART OUTPUT`."
            )
        entries = [(self.string(), self.shape(), self.number("<I"), self.number("<Q")) for _ in range(tensor_count)]
        return metadata, self.place(entries, metadata.get("general.alignment", 32))

    def place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: object) -> dict[str, GGUFTensor]:
        """Checks every tensor's type and place; the data section starts at the next aligned byte after the header."""
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{self.path} has general.alignment {alignment!r}, which must be a positive integer. Convert it again.")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        problems = []
        for name, shape, type_number, offset in entries:
            if type_number not in TENSOR_TYPES:
                problems.append(f"tensor {name!r} has type {_type_name(type_number)}")
                continue
            type_name, block_values, block_bytes = TENSOR_TYPES[type_number]
            if shape and shape[-1] % block_values:
                problems.append(f"tensor {name!r} has rows of {shape[-1]} values, not a multiple of {type_name}'s block of {block_values}")
                continue
            tensor = GGUFTensor(name, shape, type_name, start + offset, math.prod(shape) // block_values * block_bytes)
            if tensor.offset + tensor.nbytes > len(self.data):
                end = tensor.offset + tensor.nbytes
                problems.append(f"tensor {name!r} ends at byte {end}, but the file has only {len(self.data)} (truncated download?)")
            if name in tensors:
                problems.append(f"tensor {name!r} appears twice")
            tensors[name] = tensor
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            supported = ", ".join(name for name, _, _ in TENSOR_TYPES.values())
            raise CheckpointError(f"{self.path} cannot be used: {shown}. Download it again, or convert it to one of {supported}.")
        return tensors

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: its header runs past the end of the file ({len(self.data)} bytes). Download it again."
            )
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        # Some published vocabularies hold raw bytes that are not UTF-8; surrogateescape keeps them apart and reversible.
        return raw.decode("utf-8", errors="surrogateescape")

    def shape(self) -> tuple[int, ...]:
        rank = self.number("<I")
        shape = tuple(reversed([self.number("<Q") for _ in range(min(rank, 5))]))
        if not 1 <= rank <= 4 or 0 in shape:
            raise CheckpointError(f"{self.path} has a tensor of rank {rank} and shape {shape}: the file is damaged, download it again.")
        return shape

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind in (_STRING, _ARRAY):
                return [self.value(kind) for _ in range(count)]
            dtype = self.dtype(kind)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        dtype = self.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def dtype(self, kind: int) -> np.dtype:
        if kind not in _VALUE_DTYPES:
            raise CheckpointError(f"{self.path} has a metadata value of unknown type {kind}: the file is damaged, download it again.")
        return np.dtype(_VALUE_DTYPES[kind])


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return f"{GGMLQuantizationType(number).name}, which is not implemented"
    except ValueError:
        return f"number {number}, which is not a known GGUF type"
