"""Sums whose bits do not depend on how many rows are summed together."""

import jax
import jax.numpy as jnp


def row_sum(x: jax.Array) -> jax.Array:
    """x [..., K] float32 -> [..., 1], the sum over the last axis.

    XLA's CPU backend adds in another order, and computes what it has fused with the sum in another way, when there are few
    rows than when there are many: the same token would get other bits in another batch. A matrix product has the same order
    for any number of rows from two on, so there the sum is a product with ones. Elsewhere it is a plain sum.
    """

    def product(x):
        rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        ones = jnp.ones((x.shape[-1], 2), x.dtype)  # two columns: with one it would be a matrix-vector product, which adds otherwise
        sums = jax.lax.dot_general(rows, ones, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        return sums[:, :1].reshape(*x.shape[:-1], 1)

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, axis=-1, keepdims=True))
