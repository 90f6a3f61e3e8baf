"""Attention a block at a time against the plain definition, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.attention import blockwise_attend, dense_attend

LENGTHS = [(300, 200, 90), (590,)]  # of the segments of two rows; the rest is padding


def _packed(length: int):
    positions, segments = np.zeros((2, length), np.int32), np.zeros((2, length), np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for i, n in enumerate(lengths):
            positions[row, start : start + n], segments[row, start : start + n] = np.arange(n), i + 1
            start += n
        positions[row, start:] = np.arange(length - start)
    return jnp.asarray(positions), jnp.asarray(segments)


@pytest.mark.parametrize(
    "window, softcap, dtype, tolerance",
    [(None, None, jnp.float32, 2e-6), (70, 5.0, jnp.float32, 2e-6), (300, None, jnp.bfloat16, 3e-2)],
)
def test_blockwise_attention_and_its_gradients_are_the_plain_ones(window, softcap, dtype, tolerance):
    positions, segments = _packed(600)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 600, heads, 16), dtype) for key, heads in zip(keys, (4, 2, 2), strict=False))
    weights = jax.random.normal(keys[3], q.shape) * (segments > 0)[..., None, None]

    def run(make):
        def loss(q, k, v):
            out, cache = make(positions, segments)(q, k, v, "cache", 0, scale=0.3, window=window, softcap=softcap)
            assert cache == "cache" and out.dtype == dtype
            return jnp.sum(out.astype(jnp.float32) * weights), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (out * (segments > 0)[..., None, None], grads))

    for ours, plain in zip(jax.tree.leaves(run(blockwise_attend)), jax.tree.leaves(run(dense_attend)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=tolerance * max(1, np.abs(plain).max()))
