"""Products of activations with weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.layers import matmul


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lead", [(1,), (1, 1), ()])
def test_one_row_is_as_it_is_among_others(dtype, lead):
    x, w = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(8, 576), (320, 576)]))
    alone = jax.jit(matmul)(x[0].reshape(*lead, 576), w)
    assert alone.shape == (*lead, 320) and alone.dtype == dtype
    np.testing.assert_array_equal(np.asarray(alone).reshape(-1), np.asarray(jax.jit(matmul)(x, w)[0]))


def test_one_row_has_the_gradients_of_any():
    x, w = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate([(1, 32), (16, 32)]))
    loss = lambda x, w: jnp.sum(jnp.square(matmul(x, w).astype(jnp.float32)))
    one = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    two = jax.jit(jax.grad(lambda x, w: loss(jnp.concatenate([x, jnp.zeros_like(x)]), w), (0, 1)))(x, w)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2)
