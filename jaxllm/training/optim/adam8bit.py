"""Adam whose two moments are kept in 8 bits, a scale for each block (Dettmers et al., arXiv 2110.02861).

They use a dynamic code of 256 values; here the first moment is stored as the square root of its share of the block's largest,
the second as the fourth root, which spread the codes alike and need no table. A second moment that is not zero is never
rounded to zero: in the denominator it would make a step of any size. Quantised moments have the parameter's shape, and so its sharding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

_BLOCK = 256
_SMALL = 4096  # parameters with fewer values keep float32 moments, as in the paper


class Quantized(NamedTuple):
    """`codes` like the parameter (int8 or uint8), `scales` float32 [..., blocks of the last axis]."""

    codes: Array
    scales: Array


class State(NamedTuple):
    count: Array
    mu: optax.Params
    nu: optax.Params


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Like `optax.scale_by_adam`."""

    def init(params):
        def zeros(p, signed):
            x = jnp.zeros(p.shape, jnp.float32)
            return _quantize(x, signed) if _large(p) else x

        mu, nu = (jax.tree.map(lambda p, s=signed: zeros(p, s), params) for signed in (True, False))
        return State(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads, state, params=None):
        count = state.count + 1
        leaves, tree = jax.tree.flatten(grads)
        out, mus, nus = [], [], []
        for g, mu, nu in zip(leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True):
            g = g.astype(jnp.float32)
            m = b1 * _dequantize(mu) + (1 - b1) * g
            v = b2 * _dequantize(nu) + (1 - b2) * jnp.square(g)
            out.append((m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps))
            mus.append(_quantize(m, True) if _large(g) else m)
            nus.append(_quantize(v, False) if _large(g) else v)
        return tree.unflatten(out), State(count, tree.unflatten(mus), tree.unflatten(nus))

    return optax.GradientTransformation(init, update)


def _large(x: Array) -> bool:
    return x.size >= _SMALL


def _quantize(x: Array, signed: bool) -> Quantized:
    blocks = _in_blocks(x)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = blocks / jnp.where(scales == 0, 1, scales)[..., None]
    if signed:
        codes = jnp.round(127 * jnp.sign(share) * jnp.sqrt(jnp.abs(share))).astype(jnp.int8)
    else:
        codes = jnp.maximum(jnp.round(255 * jnp.sqrt(jnp.sqrt(share))), share > 0).astype(jnp.uint8)
    return Quantized(_joined(codes, x.shape[-1]), scales)


def _dequantize(x: Quantized | Array) -> Array:
    if not isinstance(x, Quantized):
        return x
    codes, scales = x
    signed = codes.dtype == jnp.int8
    blocks = _in_blocks(codes).astype(jnp.float32) / (127 if signed else 255)
    share = jnp.sign(blocks) * jnp.square(blocks) if signed else jnp.square(jnp.square(blocks))
    return _joined(share * scales[..., None], codes.shape[-1])


def _in_blocks(x: Array) -> Array:
    """[..., n] to [..., blocks, b]: the last block is filled up with zeros."""
    size = x.shape[-1]
    block = min(size, _BLOCK)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % block)])
    return padded.reshape(*x.shape[:-1], -1, block)


def _joined(blocks: Array, size: int) -> Array:
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :size]
