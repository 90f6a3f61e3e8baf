"""How objectives compute on a mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxllm.models.attention import blockwise_attend
from jaxllm.models.layers import Attend
from jaxllm.sharding import ShardingRules

_LANES = 128
Attention = Callable[[Array, Array], Attend]  # (positions, segment_ids) -> attend


@dataclass(frozen=True)
class Backend:
    """How objectives compute; made for a mesh by `backend_for`, and as it is here for one device."""

    attention: Attention = blockwise_attend
    row_shards: int = 1
    """Parts that a batch's rows are cut into: what is bounded by memory is bounded on each."""
    logits_alive: int = 1 << 24
    """Values of logits that a device makes at a time. An accelerator reads the whole head for each: it needs more tokens to be busy."""
    read_often: Callable[[Array], Array] = lambda parameter: parameter
    """A parameter [F, D] that a loop reads in every pass, put where it is read, once, before the loop."""


ONE_DEVICE = Backend()


def backend_for(mesh: Mesh, rules: ShardingRules) -> Backend:
    """JAX's splash attention on TPUs, for bfloat16 rows of a multiple of 128 tokens; `blockwise_attend` for all else."""
    platform = mesh.devices.flat[0].platform
    attention = splash_attention(mesh, rules) if platform == "tpu" else blockwise_attend
    logits_alive = Backend.logits_alive if platform == "cpu" else 1 << 26
    if mesh.size == 1:
        return Backend(attention, logits_alive=logits_alive)
    everywhere = NamedSharding(mesh, PartitionSpec(rules.vocab, None))
    axes = (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()
    shards = math.prod(mesh.shape[axis] for axis in axes)
    return Backend(attention, shards, logits_alive, lambda parameter: jax.lax.with_sharding_constraint(parameter, everywhere))


def splash_attention(mesh: Mesh, rules: ShardingRules, *, interpret: bool = False) -> Attention:
    """`jax.experimental.pallas.ops.tpu.splash_attention`, which never has a whole row of scores in memory, on each device's rows and
    heads. `interpret`: by Pallas's interpreter, on any machine."""

    def attention(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Attend:
        plain = blockwise_attend(positions, segment_ids)

        def attend(q, k, v, cache, layer, *, scale, window, softcap):
            length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
            if length % _LANES or q.dtype != jnp.bfloat16:  # the kernel multiplies float32 in bfloat16
                return plain(q, k, v, cache, layer, scale=scale, window=window, softcap=softcap)
            split = mesh.shape["tensor"] if rules.heads else 1
            if kv_heads % split:  # fewer key and value heads than devices: one for each
                k, v = (jnp.repeat(x, split // kv_heads, axis=2) for x in (k, v))
            kernel = _kernel(length, heads // split, window, softcap, interpret)
            spec = PartitionSpec(rules.batch, rules.heads, None, None)
            rows = PartitionSpec(rules.batch, None)
            local = lambda q, k, v, ids: jax.vmap(kernel)(q, k, v, _segment_ids(ids))
            run = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)
            out = run(*(jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)), segment_ids)
            return jnp.swapaxes(out, 1, 2), cache

        return attend

    return attention


def _segment_ids(ids: Int[Array, "B T"]):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(ids, ids)


@lru_cache
def _kernel(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool):
    """(q [H, T, D], k and v [Hk, T, D], segment ids) -> [H, T, D]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    one = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    with jax.ensure_compile_time_eval():  # the masks are constants, kept for every trace
        return splash.make_splash_mha(
            splash.MultiHeadMask([one] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
