"""The attention that TPUs train with, in Pallas's interpreter, against the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.attention import dense_attend
from jaxllm.sharding import ShardingRules, make_mesh
from jaxllm.training.backend import splash_attention


@pytest.mark.parametrize("window, softcap", [(None, None), (100, 20.0)])
def test_splash_attention_is_the_plain_one(window, softcap):
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 128, axis=1))
    positions = jnp.asarray(np.stack([np.r_[:128, :128], np.r_[:256]]))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (jax.random.normal(key, (2, 256, heads, 128), jnp.bfloat16) for key, heads in zip(keys, (4, 2, 2, 4), strict=True))
    splash = splash_attention(make_mesh(), ShardingRules(), interpret=True)

    def run(attention):
        def loss(q, k, v):
            out, _ = attention(positions, segments)(q, k, v, None, 0, scale=0.1, window=window, softcap=softcap)
            return jnp.sum(out.astype(jnp.float32) * w), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    for ours, plain in zip(run(splash), run(dense_attend), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-2 * np.abs(plain).max())
