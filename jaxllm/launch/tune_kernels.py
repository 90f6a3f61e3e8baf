"""`jaxllm tune-kernels`: the attention kernels' block sizes, measured on the device that is here."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm.models import ModelConfig
    from pallas_kernels.ragged_paged_attention.tuning import Work


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Measure which block sizes make ragged paged attention quickest for a model on the TPU or GPU that is here, and keep them where
    engines on such devices find them. Programs that were compiled before are then compiled anew.

    Example:

      jaxllm tune-kernels --model configs/models/llama-3-8b.yaml
      jaxllm tune-kernels --model Qwen/Qwen3-0.6B --kv-cache-dtype fp8
    """

    model: str
    "A folder, a hub name, or a YAML or JSON file with the entries of a config.json; weights are not needed."
    tensor_parallel_size: int = 1
    "Devices that the model will be split over; what one of them has of the heads is measured, on one."
    page_size: int = 64
    "Tokens in a page of the KV cache, as the engine will have it."
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    "Of weights and activations; auto is the checkpoint's own, as the engine has it."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    "Of the KV cache, if another."
    max_num_seqs: int = 64
    "Sequences to measure decode with; the sizes found are taken for any number."
    max_model_len: int = 2048
    "Keys that the longest of them has."
    max_num_batched_tokens: int = 2048
    "Tokens to measure chunks of prompts with."
    out: str | None = None
    "The table's file; by default the one in the cache folder that engines look for. What is there for other work stays."

    def __post_init__(self) -> None:
        self.check_counts("tensor_parallel_size", "page_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens")


def run(config: Config) -> dict[str, Any]:
    import jax

    from jaxllm.launch.plan import read_model_entries
    from jaxllm.models import config_from_hf
    from jaxllm.serving.defaults import default_dtype

    device = jax.devices()[0]
    if device.platform not in ("tpu", "gpu"):
        raise ConfigError(
            f"tune-kernels measures on a TPU or GPU, and there is none here: JAX's default device is {device.device_kind} "
            f"({device.platform}). For chips that are elsewhere, jaxllm kernels compiles, but does not measure"
        )
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    entries = read_model_entries(config.model)
    if config.dtype == "auto":
        config = replace(config, dtype=default_dtype(device.platform, entries))
    return tune_model(config, config_from_hf(entries), device.platform, device.device_kind, capability)


def tune_model(
    config: Config, model: ModelConfig, platform: str, device_kind: str, capability: str | None = None, *, interpret: bool = False
) -> dict[str, Any]:
    """Measures, writes the table, and tells what was found. `interpret`: in the kernels' interpreters, on any machine (for tests)."""
    from jaxllm.serving.block_sizes import table_path
    from pallas_kernels.ragged_paged_attention import Table, read_table, unsupported, write_table
    from pallas_kernels.ragged_paged_attention.measure import Load, tune

    path = table_path(device_kind) if config.out is None else Path(config.out)
    try:
        before = read_table(path) if path.exists() else Table(device_kind, ())
    except (OSError, ValueError) as error:
        raise ConfigError(f"out: {error}") from error
    if before.device_kind != device_kind:
        raise ConfigError(f"out: {path} has block sizes for {before.device_kind!r}, and the device here is {device_kind!r}")
    if not os.access(next(folder for folder in path.absolute().parents if folder.exists()), os.W_OK):
        raise ConfigError(f"out: {path} cannot be written: give --out FILE in a folder where you may write")
    works = work_of(config, model, platform)
    if reason := unsupported(platform, works[0].page_size, works[0].width, works[0].kv_dtype, capability):
        raise ConfigError(f"the kernels cannot do this work on {device_kind}: {reason}")

    load = Load(config.max_num_seqs, config.max_model_len, config.max_num_batched_tokens)
    tell = lambda blocks, seconds, said: print(
        f"  {blocks}: {'no' if seconds is None else f'{1e6 * seconds:.1f} us'} {said}".rstrip(), file=sys.stderr, flush=True
    )
    entries = []
    for work in works:
        print(f"{work.kernel}: {work.heads}:{work.kv_heads} x {work.width}, pages of {work.page_size}", file=sys.stderr, flush=True)
        entries.append(tune(platform, work, load, interpret=interpret, progress=tell))
    write_table(before.with_entries(entries), path)
    if not config.json:
        for entry in entries:
            print(f"{entry.work.kernel}: {entry.blocks}, {entry.heuristic_seconds / entry.seconds:.2f} times as fast as the heuristic's")
        print(f"wrote {path}")
    found = [
        {"work": e.work._asdict(), "blocks": e.blocks._asdict(), "seconds": e.seconds, "heuristic_seconds": e.heuristic_seconds}
        for e in entries
    ]
    return {"device_kind": device_kind, "path": str(path), "entries": found}


def work_of(config: Config, model: ModelConfig, platform: str) -> list[Work]:
    """What one device has to do of the model's attention: decode, and chunks of prompts."""
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh

    from jaxllm.serving.kv_cache import cache_dtype, num_cache_heads
    from jaxllm.sharding import MESH_AXES, ShardingRules, fit_to_model
    from pallas_kernels.ragged_paged_attention import page_width
    from pallas_kernels.ragged_paged_attention.tuning import Work

    sizes = tuple(config.tensor_parallel_size if axis == "tensor" else 1 for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES)
    rules = fit_to_model(ShardingRules(), model, mesh)
    shards = 1 if rules.heads is None else mesh.shape[rules.heads]
    heads, kv_heads = model.num_heads // shards, num_cache_heads(model, rules, mesh) // shards
    dtype = jnp.dtype(config.dtype)
    kv_dtype = cache_dtype(config.kv_cache_dtype, dtype).name
    width = page_width(platform, model.head_dim)
    return [Work(kernel, heads, kv_heads, width, config.page_size, dtype.name, kv_dtype) for kernel in ("decode", "chunks")]
