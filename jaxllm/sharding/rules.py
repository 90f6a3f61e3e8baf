"""Logical axes to mesh axes, as data."""

import logging
from dataclasses import dataclass, replace

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig

logger = logging.getLogger(__name__)

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class ShardingRules:
    """For each logical axis of a parameter or activation, the mesh axis (or axes) that it is split over; None: not split."""

    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    batch: MeshAxes = ("data", "fsdp")
    sequence: MeshAxes = "context"
    layers: MeshAxes = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))


def named_sharding(mesh: Mesh, rules: ShardingRules, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, rules.spec(axes))


def fit_to_model(rules: ShardingRules, config: ModelConfig, mesh: Mesh) -> ShardingRules:
    """The rules with each axis that this model cannot split evenly left whole, which is logged.

    Attention is split by whole heads: if the query heads do not divide, attention runs whole on every device. Key and value
    heads that are fewer than the devices are repeated, one to a device (`serving.attend`); their projections are split within heads
    all the same, where that is even: what they make is little, and is gathered.
    """
    n = mesh.shape["tensor"]
    if n == 1:
        return rules
    whole: dict[str, str] = {}
    kv_repeat = config.num_kv_heads < n and n % config.num_kv_heads == 0
    if config.num_heads % n or not (config.num_kv_heads % n == 0 or kv_repeat):
        whole["heads"] = whole["kv_heads"] = f"{config.num_heads} query and {config.num_kv_heads} key/value heads"
    elif kv_repeat and config.num_kv_heads * config.head_dim % n:
        rules = replace(rules, kv_heads=None)
    if config.intermediate_size % n:
        whole["mlp"] = f"intermediate size {config.intermediate_size}"
    if config.vocab_size % n:
        whole["vocab"] = f"vocabulary {config.vocab_size}"
    for reason in dict.fromkeys(whole.values()):
        logger.warning("tensor parallel %d does not divide the %s: that part is kept whole on every device", n, reason)
    if {"heads", "mlp", "vocab"} <= set(whole):
        raise ConfigError(f"tensor_parallel_size={n} divides neither the heads, the MLP nor the vocabulary of this model; choose another")
    return replace(rules, **dict.fromkeys(whole))
