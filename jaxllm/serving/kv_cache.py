"""The KV cache: one buffer of pages for all layers, and the pool that hands pages out."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.models import ModelConfig
from jaxllm.sharding import ShardingRules


class PagePool:
    """Hands out page numbers. Page 0 is never handed out: padding points at it."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def capacity(self) -> int:
        """Pages that can be in use at once."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """n pages. The caller has made sure that they are there."""
        assert n <= len(self._free), f"{n} pages asked for, {len(self._free)} free"
        taken = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        return taken

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))


def num_cache_heads(config: ModelConfig, rules: ShardingRules, mesh: Mesh) -> int:
    """Key/value heads in the cache: each repeated where there are fewer heads than devices that share them."""
    shards = 1 if rules.heads is None else mesh.shape[rules.heads]
    return max(config.num_kv_heads, shards)


def page_bytes(config: ModelConfig, heads: int, page_size: int, dtype) -> int:
    """Bytes of one page in all layers, on all devices together."""
    return config.num_layers * 2 * heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def make_kv_pages(config: ModelConfig, rules: ShardingRules, mesh: Mesh, num_pages: int, page_size: int, dtype) -> jax.Array:
    """Zeros [layers * pages, 2, heads, page_size, head_dim], split by heads: layer l's page p is number l * pages + p."""
    heads = num_cache_heads(config, rules, mesh)
    shape = (config.num_layers * num_pages, 2, heads, page_size, config.head_dim)
    sharding = NamedSharding(mesh, PartitionSpec(None, None, rules.heads))
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
