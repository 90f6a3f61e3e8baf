"""Writing a Hugging Face folder: config.json and safetensors, streamed and atomic."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxllm.checkpoints.safetensors_source import DTYPES, INDEX_NAME
from jaxllm.errors import CheckpointError

_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    folder: str | os.PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: dict[str, object],
    *,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
    copy_files: Iterable[str | os.PathLike] = (),
) -> Path:
    """Writes `tensors` and `config` as a Hugging Face checkpoint, with copies of `copy_files` (a tokenizer, say; a folder
    is copied whole) beside them.

    At most one shard is held in memory. The folder appears complete or not at all: it is made beside its place and then renamed.
    Raises CheckpointError for a non-empty folder (unless `overwrite`, which replaces a checkpoint and nothing else), a repeated name,
    or a dtype that safetensors lacks.
    """
    folder = check_target(folder, overwrite)
    with whole_folder(folder) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in copy_files:
            if Path(file).is_dir():
                shutil.copytree(file, staging / Path(file).name)
            else:
                shutil.copy(file, staging)
        _write_shards(staging, tensors, max_shard_bytes)
    return folder


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` at the end of the block; if that fails, nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _replace(folder, staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_target(folder: str | os.PathLike, overwrite: bool, *, what: str = "checkpoint", marker: str = "config.json") -> Path:
    """The absolute path of a folder that may be written to; what is replaced must hold the file `marker`, as every `what` does.

    Raises CheckpointError as `write_safetensors` says.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"Cannot write the {what} at {folder}: a file is there. Choose another folder.")
        if any(folder.iterdir()):
            if not overwrite:
                raise CheckpointError(f"The folder {folder} is not empty. Choose another, or pass overwrite=True to replace it.")
            if not (folder / marker).exists():
                raise CheckpointError(f"{folder} has no {marker}, so it is no {what} and is not overwritten. Choose another.")
    return folder


def _replace(folder: Path, staging: Path) -> None:
    if not folder.exists():
        os.rename(staging, folder)
        return
    # A folder can only be renamed onto an empty one, so the old one steps aside first, and back if anything fails.
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, retired)
    try:
        os.rename(staging, folder)
    except BaseException:
        os.rename(retired, folder)
        raise
    shutil.rmtree(retired)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    total = held = 0

    def flush() -> None:
        write_file(folder / f"part-{len(shards)}", shard)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        tensor = np.ascontiguousarray(tensor).reshape(np.shape(tensor))
        if name in seen:
            raise CheckpointError(f"Tensor {name!r} was given twice; a checkpoint needs distinct names.")
        if tensor.dtype not in _TYPE_NAMES:
            raise CheckpointError(f"Tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold: cast it to float32.")
        if shard and held + tensor.nbytes > max_shard_bytes:
            flush()
            held = 0
        seen.add(name)
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    if shard or not shards:
        flush()

    # How many shards there are, which their names tell, is known only now.
    if len(shards) == 1:
        os.rename(folder / "part-0", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"part-{number}", folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, and waits until it is on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Readers that map the file want every tensor aligned: the widest types come first.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    offset = 0
    for name, tensor in ordered.items():
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # PyTorch sums in another order where a matrix does not begin at a multiple of 64 bytes.
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered.values():
            stream.write(tensor.reshape(-1).view(np.uint8))
        stream.flush()
        os.fsync(stream.fileno())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
