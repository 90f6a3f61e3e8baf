"""What pages of one byte a number hold."""

import jax
import jax.numpy as jnp

LIMITS = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}  # the largest magnitudes


def as_stored(x: jax.Array, dtype) -> jax.Array:
    """x in a page's type; in one of a byte, what is out of range becomes the largest there is (a plain cast would make it NaN)."""
    limit = LIMITS.get(jnp.dtype(dtype))
    if limit is None:
        return x.astype(dtype)
    x = jnp.clip(x.astype(jnp.float32), -limit, limit)
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)
