"""Copying pages of the KV cache, before a step in which forks write into pages that they have in common with others."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class CopyPages:
    """One compiled program, for up to `most` pages at a time. Nothing is compiled before it is asked for."""

    def __init__(self, kv_pages: jax.Array, *, num_pages: int, most: int, mesh: Mesh):
        self._most, self._mesh, self._whole = most, mesh, NamedSharding(mesh, PartitionSpec())
        self._abstract = jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype, sharding=kv_pages.sharding)
        self._copy = partial(_copy, num_pages=num_pages)

    def compile(self):
        pairs = jax.ShapeDtypeStruct((1 + self._most, 2), jnp.int32, sharding=self._whole)
        with jax.set_mesh(self._mesh):
            jitted = jax.jit(self._copy, donate_argnums=0, out_shardings=self._abstract.sharding)
            return jitted.lower(self._abstract, pairs).compile()

    def pack(self, copies: tuple[tuple[int, int], ...]) -> np.ndarray:
        """int32 [1 + most, 2]: how many there are, and page numbers (from, to)."""
        pairs = np.zeros((1 + self._most, 2), np.int32)
        pairs[0, 0] = len(copies)
        pairs[1 : 1 + len(copies)] = copies
        return pairs

    def run(self, program, kv_pages: jax.Array, pairs: np.ndarray) -> jax.Array:
        """The cache with the copies made, one after the other, in all layers; `kv_pages` is used up."""
        return program(kv_pages, jax.device_put(pairs, self._whole))


def _copy(kv_pages: jax.Array, pairs: jax.Array, *, num_pages: int) -> jax.Array:
    by_layer = kv_pages.reshape(-1, num_pages, *kv_pages.shape[1:])

    def one(i, pages):
        source, target = pairs[1 + i]
        page = jax.lax.dynamic_index_in_dim(pages, source, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(pages, page, target, axis=1)

    return jax.lax.fori_loop(0, pairs[0, 0], one, by_layer).reshape(kv_pages.shape)
