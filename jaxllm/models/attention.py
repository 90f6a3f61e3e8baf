"""Attention without a cache, for training and for checks: the `attend` of [B, T] or [T] tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.layers import Attend
from pallas_kernels.row_sum import row_sum

_BLOCKS = 8  # of queries in a row of tokens, at most
_MIN_BLOCK = 256


def dense_attend(positions: Int[Array, "*B T"], segment_ids: Int[Array, "*B T"] | None = None) -> Attend:
    """Causal attention over whole rows; with `segment_ids`, only within a segment (packed examples do not see each other).

    A token sees tokens at positions up to its own, and, with a sliding window, only the last `window` of them. The plain
    definition, which makes all scores at once; `blockwise_attend` is the same in less memory.
    """

    def attend(q, k, v, cache, layer, *, scale, window, softcap):
        group = q.shape[-2] // k.shape[-2]
        precision = _precision(q)
        qg = q.reshape(*q.shape[:-2], k.shape[-2], group, q.shape[-1])
        scores = jnp.einsum("...qhgd,...khd->...hgqk", qg, k, precision=precision, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = _seen(positions, positions, segment_ids, segment_ids, window)
        weights = jax.nn.softmax(jnp.where(seen[..., None, None, :, :], scores, -1e30), axis=-1).astype(v.dtype)
        out = jnp.einsum("...hgqk,...khd->...qhgd", weights, v, precision=precision)
        return out.reshape(q.shape), cache

    return attend


def blockwise_attend(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Attend:
    """`dense_attend` a block of queries at a time, over the keys that the block can see; scores are computed anew in the
    backward pass (Dao, arXiv 2307.08691, algorithms 1 and 2), so that [T, T] of them are never kept.

    Positions must rise by one along each segment.
    """

    def attend(q, k, v, cache, layer, *, scale, window, softcap):
        b, t, heads, d = q.shape
        kv_heads = k.shape[2]
        q = jnp.transpose(q.reshape(b, t, kv_heads, heads // kv_heads, d), (0, 2, 3, 1, 4))
        k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
        out = _blockwise(q, k, v, positions, segment_ids, scale, window, softcap)
        return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, heads, d), cache

    return attend


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blockwise(
    q: Float[Array, "B H G T D"], k: Float[Array, "B H T D"], v: Float[Array, "B H T D"], positions, segment_ids, scale, window, softcap
) -> Float[Array, "B H G T D"]:
    return _forward(q, k, v, positions, segment_ids, scale, window, softcap)[0]


def _forward(q, k, v, positions, segment_ids, scale, window, softcap):
    outs, lses = [], []
    for queries, keys in _blocks(q.shape[3], window):
        seen = _seen(positions[:, queries], positions[:, keys], segment_ids[:, queries], segment_ids[:, keys], window)
        scores = _scores(q[:, :, :, queries], k[:, :, keys], seen, scale, softcap)[0]
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total = row_sum(weights)
        out = _product("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v[:, :, keys])
        outs.append((out / total).astype(q.dtype))
        lses.append(top + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
    return out, (q, k, v, out, lse, positions, segment_ids)


def _backward(scale, window, softcap, saved, g):
    q, k, v, out, lse, positions, segment_ids = saved
    mean = row_sum(g.astype(jnp.float32) * out.astype(jnp.float32))
    # The tall matrices of scores are always the right operand, never the one that XLA's CPU backend would transpose.
    transposed = partial(_product, "bhgqd,bhgqk->bhdk")
    shape = (*k.shape[:2], k.shape[3], k.shape[2])
    dq, dk, dv = [], jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    for queries, keys in _blocks(q.shape[3], window):
        seen = _seen(positions[:, queries], positions[:, keys], segment_ids[:, queries], segment_ids[:, keys], window)
        qs, ks, gs = q[:, :, :, queries], k[:, :, keys], g[:, :, :, queries]
        scores, slope = _scores(qs, ks, seen, scale, softcap)
        weights = jnp.exp(scores - lse[:, :, :, queries])
        dweights = _product("bhgqd,bhkd->bhgqk", gs, v[:, :, keys])
        dscores = weights * (dweights - mean[:, :, :, queries])
        dscores = (dscores if slope is None else dscores * slope).astype(q.dtype)
        dq.append(_product("bhgqk,bhkd->bhgqd", dscores, ks) * scale)
        dk = dk.at[..., keys].add(transposed(qs, dscores) * scale)
        dv = dv.at[..., keys].add(transposed(gs, weights.astype(g.dtype)))
    dk, dv = (jnp.swapaxes(x, 2, 3).astype(k.dtype) for x in (dk, dv))
    return jnp.concatenate(dq, axis=3).astype(q.dtype), dk, dv, None, None


_blockwise.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, and for each the keys that some query of it may see."""
    size = max(_MIN_BLOCK, -(-length // _BLOCKS))
    starts = range(0, length, size)
    first = lambda start: 0 if window is None else max(0, start - window + 1)
    return [(slice(s, min(s + size, length)), slice(first(s), min(s + size, length))) for s in starts]


def _scores(q, k, seen, scale, softcap):
    """Scores [B, H, G, Q, K] in float32, hidden ones -1e30, and the slope that the soft cap has there (None: 1)."""
    scores = _product("bhgqd,bhkd->bhgqk", q, k) * scale
    slope = None
    if softcap is not None:
        flat = jnp.tanh(scores / softcap)
        scores, slope = softcap * flat, 1 - jnp.square(flat)
    return jnp.where(seen[:, None, None], scores, -1e30), slope


def _seen(query_positions, key_positions, query_segments, key_segments, window: int | None) -> Array:
    """Which keys each query sees: [..., Q, K]."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if query_segments is not None:
        seen &= query_segments[..., :, None] == key_segments[..., None, :]
    return seen


def _product(spec: str, a: Array, b: Array) -> Array:
    """An einsum summed in float32. XLA's CPU backend has no such product of two bfloat16 matrices for every order of axes."""
    product = partial(jnp.einsum, spec, precision=_precision(a), preferred_element_type=jnp.float32)
    wide = lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b, cpu=wide, default=product)


def _precision(x: Array) -> jax.lax.Precision | None:
    """float32 stays float32 on chips whose default is to multiply it in bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
