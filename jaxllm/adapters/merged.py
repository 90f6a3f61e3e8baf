"""A model with its adapter in the weights, written for engines that know no adapters."""

import os
from pathlib import Path

import jax.numpy as jnp

from jaxllm.adapters.peft import merge_into
from jaxllm.checkpoints import open_checkpoint, resolve_model
from jaxllm.checkpoints.convert import Dtype
from jaxllm.checkpoints.export import export_model
from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.writer import check_target
from jaxllm.sharding import ShardingRules, make_mesh


def export_merged(
    base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike, *, dtype: Dtype = "bfloat16", overwrite: bool = False
) -> Path:
    """Writes the model `base` (a folder, a `.gguf` file, a hub name or `demo`) with the adapter of a PEFT folder in its weights, as a
    Hugging Face folder. The sums are float32, and so is the model in memory. Raises CheckpointError as `load_adapter` and `export_model`.
    """
    check_target(out, overwrite)
    path = resolve_model(base)
    source = open_checkpoint(path)
    merged = merge_into(load_model(source, dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules()), adapter, base_model=str(base))
    return export_model(merged.config, merged.params, out, base=path, dtype=dtype, overwrite=overwrite)
