"""This machine's processor as a topology: what it can do was measured here, as makers publish no such figures."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.host_memory import total_bytes
from jaxllm.models.layers import matmul
from jaxllm.sharding.chips import Chip

_STREAMED_BYTES = 512 << 20  # more than most caches hold, and what a small model's weights are
_FEW, _MANY = 8, 512  # rows of a decode step's products, and of a prefill's


def cpu_chip(dtype) -> Chip:
    """`bandwidth`: at which products of a few rows read weights of `dtype`; `flops`: those of products of many rows. It takes two
    seconds, in which nothing else should run."""
    side = 4096
    weights = [jnp.zeros((side, side), dtype) for _ in range(_STREAMED_BYTES // (side * side * jnp.dtype(dtype).itemsize))]
    bandwidth = _STREAMED_BYTES / _seconds(_chain, jnp.zeros((_FEW, side), dtype), weights)
    del weights
    side, count = 2048, 4
    seconds = _seconds(_chain, jnp.zeros((_MANY, side), dtype), [jnp.zeros((side, side), dtype)] * count)
    return Chip("cpu", "cpu", ("cpu",), total_bytes(), bandwidth, 2.0 * _MANY * side * side * count / seconds, 1, ("1",), "cpu")


@jax.jit
def _chain(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    for w in weights:
        x = matmul(x, w)
    return x


def _seconds(function: Callable, *arguments) -> float:
    """The least of a few runs; the first compiles."""
    least = math.inf
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        least = min(least, time.perf_counter() - start)
    return least
