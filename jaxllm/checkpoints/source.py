"""A checkpoint on disk, seen as named tensors with Hugging Face's names, shapes and values, whatever its format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from jaxllm.errors import CheckpointError

Index = tuple[slice, ...]


class TensorInfo(NamedTuple):
    """Shape and dtype (numpy's name: "float32", "bfloat16", ...) of what `TensorSource.read` returns."""

    shape: tuple[int, ...]
    dtype_name: str


class TensorSource(Protocol):
    """`config` is the content of Hugging Face's config.json (rebuilt from the metadata for GGUF); `tensors` has HF names."""

    path: Path
    config: dict[str, object]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part of it that `index` selects (fewer slices than axes leave the last axes whole).

        Reads only what it returns, wherever the layout allows, and keeps nothing in memory. Raises CheckpointError for an unknown name.
        """
        ...


def open_checkpoint(path: str | os.PathLike) -> TensorSource:
    """Opens a folder of safetensors (one file, or shards and their index), a GGUF file, or a folder holding exactly one GGUF file.

    Every header is checked here and no tensor is read. Raises one CheckpointError that lists everything that is wrong.
    """
    from jaxllm.checkpoints.gguf_source import GGUFSource
    from jaxllm.checkpoints.safetensors_source import SafetensorsSource

    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFSource(path)
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file. Name the folder that holds config.json and the safetensors.")
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint at {path}: the path does not exist. Check its spelling.")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"Cannot list the folder {path}: {error.strerror}. Check its permissions.") from error
    if not names:
        raise CheckpointError(f"The folder {path} is empty. A checkpoint has config.json and model.safetensors, or one .gguf file.")
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(f"{path} holds an adapter (adapter_config.json), not a model. Load its base model and add this to it.")
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return SafetensorsSource(path)

    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return GGUFSource(path / ggufs[0])
    if ggufs:
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files ({', '.join(ggufs)}). Name the one to load.")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise CheckpointError(
            f"{path} holds weights only as pickles ({', '.join(pickles)}), which can run code when loaded and are not implemented. "
            "Convert them to safetensors (in transformers: model.save_pretrained(folder)), or get a revision that has them."
        )
    raise CheckpointError(f"{path} holds no weights: no .safetensors and no .gguf file among {', '.join(names[:10])}. Download it again.")
