"""The engine's programs from shapes alone: no weights, no devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.checkpoints.load import Model, abstract_decoder
from jaxllm.models import ModelConfig
from jaxllm.serving.block_sizes import find_table
from jaxllm.serving.defaults import pool_pages, scans_layers
from jaxllm.serving.kv_cache import abstract_kv_pages, cache_dtype, num_cache_heads, page_bytes
from jaxllm.serving.programs import DeviceState, LayerByLayer, WholeStep
from jaxllm.serving.slot_state import abstract_slots
from jaxllm.sharding import ShardingRules, fit_to_model, make_mesh, named_sharding


def abstract_model(config: ModelConfig, mesh: Mesh, rules: ShardingRules, dtype, *, scan_layers: bool) -> Model:
    """A model whose parameters are shapes with places on the mesh."""
    graph, state = abstract_decoder(config, scan_layers=scan_layers, dtype=dtype)
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        axes = ("layers", *variable.logical_axes) if path[0] == "blocks" else variable.logical_axes
        sharding = named_sharding(mesh, rules, axes)
        flat[path] = variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding))
    return Model(config, graph, nnx.from_flat_state(flat.items()), scanned=scan_layers)


def abstract_engine(
    config: ModelConfig,
    devices: Sequence[Any],
    *,
    tensor: int,
    dtype=jnp.bfloat16,
    page_size: int,
    max_num_seqs: int,
    max_model_len: int,
    max_logprobs: int = 20,
    kv_cache_dtype: str = "auto",
) -> WholeStep | LayerByLayer:
    """What compiles the steps of an engine on such devices, with as many pages as it would choose if memory is no bound."""
    mesh = make_mesh(list(devices), tensor=tensor)
    rules = fit_to_model(ShardingRules(), config, mesh)
    kv_dtype, of_one = cache_dtype(kv_cache_dtype, dtype), -(-max_model_len // page_size)
    a_page = page_bytes(config, num_cache_heads(config, rules, mesh), page_size, kv_dtype, mesh)
    num_pages = pool_pages(devices[0].platform, max_num_seqs, of_one, a_page, least=of_one * a_page)
    pages = abstract_kv_pages(config, rules, mesh, num_pages, page_size, kv_dtype)
    state = DeviceState(pages, abstract_slots(max_num_seqs, max_model_len, config.vocab_size, mesh))
    tuned = find_table(devices[0].device_kind)
    scan = scans_layers(devices[0].platform)
    model, way = abstract_model(config, mesh, rules, dtype, scan_layers=scan), WholeStep if scan else LayerByLayer
    return way(model, state, num_pages=num_pages, mesh=mesh, rules=rules, dtype=dtype, max_logprobs=max_logprobs, tuned=tuned)


def bytes_on_a_device(tree: Any) -> int:
    """Of all the leaves, each split as its sharding says."""
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
