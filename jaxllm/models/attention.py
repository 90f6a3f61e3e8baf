"""Attention without a cache, for training and for checks: the `attend` of [B, T] or [T] tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.models.layers import Attend


def dense_attend(positions: Int[Array, "*B T"], segment_ids: Int[Array, "*B T"] | None = None) -> Attend:
    """Causal attention over whole rows; with `segment_ids`, only within a segment (packed examples do not see each other).

    A token sees tokens at positions up to its own, and, with a sliding window, only the last `window` of them.
    """

    def attend(q, k, v, cache, layer, *, scale, window, softcap):
        group = q.shape[-2] // k.shape[-2]
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        qg = q.reshape(*q.shape[:-2], k.shape[-2], group, q.shape[-1])
        scores = jnp.einsum("...qhgd,...khd->...hgqk", qg, k, precision=precision, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = positions[..., :, None] - positions[..., None, :]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if segment_ids is not None:
            seen &= segment_ids[..., :, None] == segment_ids[..., None, :]
        weights = jax.nn.softmax(jnp.where(seen[..., None, None, :, :], scores, -1e30), axis=-1).astype(v.dtype)
        out = jnp.einsum("...hgqk,...khd->...qhgd", weights, v, precision=precision)
        return out.reshape(q.shape), cache

    return attend
