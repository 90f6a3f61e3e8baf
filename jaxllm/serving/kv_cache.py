"""The KV cache: one buffer of pages for all layers, and the pool that hands pages out."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import takewhile

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.models import ModelConfig
from jaxllm.sharding import ShardingRules
from pallas_kernels.ragged_paged_attention import page_width


class PagePool:
    """Hands out page numbers, and remembers what full pages hold, so that requests that begin alike share them.

    A page is in use by some sequences, or cached (in use by none, contents known), or free. Cached pages count as free: when
    no others are left, the one used longest ago is taken. Page 0 is never handed out: padding points at it.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._users = [0] * num_pages
        self._name: dict[int, bytes] = {}  # of pages whose contents are known
        self._page: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one used longest ago first

    @property
    def capacity(self) -> int:
        """Pages that can be in use at once."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._cached)

    def take(self, n: int) -> list[int]:
        """n pages, their contents forgotten. The caller has made sure that they are there."""
        assert n <= self.num_free, f"{n} pages asked for, {self.num_free} free"
        pages = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for page in pages:
            self._users[page] = 1
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """One user fewer of each page. The last pages of a sequence are forgotten before its first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._name:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, name: bytes) -> None:
        """A page in use is full, and will not be written again; `name` stands for its contents and all before them."""
        if name not in self._page and page not in self._name:
            self._page[name], self._name[page] = page, name

    def find(self, names: list[bytes]) -> list[int]:
        """The pages that hold the longest known beginning of `names`."""
        return [self._page[name] for name in takewhile(self._page.__contains__, names)]

    def num_used(self, names: list[bytes]) -> int:
        """How many of the pages that `find` gives are in use."""
        return sum(self._users[page] > 0 for page in self.find(names))

    def share(self, pages: list[int]) -> None:
        """One user more of each page that `find` gave."""
        for page in pages:
            self._users[page] += 1
            self._cached.pop(page, None)

    def forget(self) -> None:
        """Forgets the contents of all pages; those in use stay in use."""
        self._name.clear()
        self._page.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def on_host(self, names: Sequence[bytes]) -> int:
        """How many of the first names stand for pages that host memory has (`host_tier.TieredPool`)."""
        return 0

    def _evict(self) -> int:
        page = self._victim()
        del self._cached[page]
        name = self._name.pop(page)
        del self._page[name]
        self._evicted(page, name)
        return page

    def _victim(self) -> int:
        """The cached page to give up."""
        return next(iter(self._cached))

    def _evicted(self, page: int, name: bytes) -> None:
        """What a page holds is about to be overwritten."""


def page_names(tokens: Sequence[int], page_size: int, before: bytes = b"") -> list[bytes]:
    """A name for each full page of `tokens`: a hash of what it holds and of the name `before` it, so of everything before."""
    names = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        before = blake2b(before + array("i", tokens[start : start + page_size]).tobytes(), digest_size=16).digest()
        names.append(before)
    return names


def salt_name(salt: str | None) -> bytes:
    """What `page_names` begin with: pages of requests with another salt have other names."""
    return b"" if salt is None else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"salt").digest()


def num_cache_heads(config: ModelConfig, rules: ShardingRules, mesh: Mesh) -> int:
    """Key/value heads in the cache: each repeated where there are fewer heads than devices that share them."""
    shards = 1 if rules.heads is None else mesh.shape[rules.heads]
    return max(config.num_kv_heads, shards)


def cache_dtype(name: str, dtype) -> jnp.dtype:
    """Of the KV cache, by its name in EngineConfig, with a model of `dtype`."""
    return jnp.dtype(jnp.float8_e4m3fn if name in ("fp8", "fp8_e4m3") else dtype)


def page_bytes(config: ModelConfig, heads: int, page_size: int, dtype, mesh: Mesh) -> int:
    """Bytes of one page in all layers, on all devices together."""
    return config.num_layers * 2 * heads * page_size * _width(config, mesh) * jnp.dtype(dtype).itemsize


def _width(config: ModelConfig, mesh: Mesh) -> int:
    return page_width(mesh.devices.flat[0].platform, config.head_dim)


def abstract_kv_pages(config: ModelConfig, rules: ShardingRules, mesh: Mesh, num_pages: int, page_size: int, dtype) -> jax.ShapeDtypeStruct:
    """[layers * pages, 2, heads, page_size, W], split by heads: layer l's page p is number l * pages + p; W is head_dim, or on TPUs
    the next multiple of 128."""
    shape = (config.num_layers * num_pages, 2, num_cache_heads(config, rules, mesh), page_size, _width(config, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(None, None, rules.heads)))


def make_kv_pages(config: ModelConfig, rules: ShardingRules, mesh: Mesh, num_pages: int, page_size: int, dtype) -> jax.Array:
    """Zeros."""
    pages = abstract_kv_pages(config, rules, mesh, num_pages, page_size, dtype)
    return jax.jit(lambda: jnp.zeros(pages.shape, pages.dtype), out_shardings=pages.sharding)()
