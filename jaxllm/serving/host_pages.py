"""Pages of the KV cache in host memory, and the copies there and back.

Copies there begin before the step that overwrites the pages, and what comes of them is put in its place a step later, while that step
runs; copies back are under way before the step is started. Nobody waits for either but the device, for what its own memory takes.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_MOST_BYTES = 32 << 20  # that are moved at a time


@dataclass
class HostPagesStats:
    """Pages that were copied to host memory and back, and the seconds that the host's thread spent on it; `exposed_s` of them at most
    while the device had nothing else to do. `moves`: how often each program ran, by kind and size."""

    saved: int = 0
    fetched: int = 0
    host_s: float = 0.0
    exposed_s: float = 0.0
    moves: Counter[tuple[str, int]] = field(default_factory=Counter)


class HostPages:
    """`host_pages` pages of all layers, [host_pages, layers, 2, heads, page_size, W]: memory that is taken as it is filled."""

    def __init__(self, kv_pages: jax.Array, *, num_pages: int, host_pages: int, mesh: Mesh):
        layers, page = kv_pages.shape[0] // num_pages, kv_pages.shape[1:]
        self._mesh, self._whole, self._num_pages = mesh, NamedSharding(mesh, PartitionSpec()), num_pages
        self._abstract = jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype, sharding=kv_pages.sharding)
        self._buffer = np.empty((host_pages, layers, *page), kv_pages.dtype)
        self._pages = NamedSharding(mesh, PartitionSpec(None, None, *kv_pages.sharding.spec[1:]))  # of some of them, on the device
        most = max(1, min(64, num_pages - 1, _MOST_BYTES // self._buffer[0].nbytes))
        self.sizes = sorted({1, -(-most // 8), most})  # pages that are moved at a time
        self._on_the_way: list[tuple[list[int], jax.Array]] = []  # (slots, their pages)
        self.stats = HostPagesStats()

    @property
    def page_bytes(self) -> int:
        return self._buffer[0].nbytes

    def compile(self, kind: str, size: int):
        """`kind`: "save" or "fetch"."""
        ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=self._whole)
        if kind == "save":
            jitted = jax.jit(partial(_gather, num_pages=self._num_pages), out_shardings=self._saved_sharding())
            arguments = (self._abstract, ids)
        else:
            jitted = jax.jit(partial(_scatter, num_pages=self._num_pages), donate_argnums=0, out_shardings=self._abstract.sharding)
            pages = jax.ShapeDtypeStruct((size, *self._buffer.shape[1:]), self._buffer.dtype, sharding=self._pages)
            arguments = (self._abstract, ids, pages)
        with jax.set_mesh(self._mesh):
            return jitted.lower(*arguments).compile()

    def move(self, program, kv_pages: jax.Array, saves: Sequence[tuple[int, int]], fetches: Sequence[tuple[int, int]]) -> jax.Array:
        """The cache with the pages of `fetches` (slot, page) in their places, after those of `saves` (page, slot) are on their way;
        `kv_pages` is used up. `program(kind, size)` gives what `compile` has made."""
        if not (saves or fetches or self._on_the_way):
            return kv_pages
        start = since = time.perf_counter()
        self._arrive()  # what was saved before the last step
        for part, size in self._parts(saves):
            pages = program("save", size)(kv_pages, self._ids([page for page, _ in part], size))
            pages.copy_to_host_async()
            self._on_the_way.append(([slot for _, slot in part], pages))
            self.stats.moves["save", size] += 1
        if fetches and self._on_the_way and {slot for slot, _ in fetches} & {slot for _, slot in saves}:
            self._arrive()  # given up and wanted again at once: this waits for the step before
        since = self._count_exposed(since, kv_pages)
        for part, size in self._parts(fetches):
            pages = np.zeros((size, *self._buffer.shape[1:]), self._buffer.dtype)
            np.take(self._buffer, [slot for slot, _ in part], axis=0, out=pages[: len(part)])
            ids, pages = self._ids([page for _, page in part], size), jax.device_put(pages, self._pages)
            since = self._count_exposed(since, kv_pages)
            kv_pages = program("fetch", size)(kv_pages, ids, pages)
            self.stats.moves["fetch", size] += 1
        self.stats.saved += len(saves)
        self.stats.fetched += len(fetches)
        self.stats.host_s += time.perf_counter() - start
        return kv_pages

    def _count_exposed(self, since: float, kv_pages: jax.Array) -> float:
        """If the device has nothing left to do, it may have waited from `since` on. Returns the time."""
        now = time.perf_counter()
        if kv_pages.is_ready():
            self.stats.exposed_s += now - since
        return now

    def device_s(self, program: Callable[[str, int], Callable], kv_pages: jax.Array) -> tuple[float, jax.Array]:
        """(seconds that the device's programs took for all the moves so far, each as long as it takes now by itself; the cache,
        as `kv_pages` is used up). Writes to page 0 alone, which is nobody's."""
        total = 0.0
        for (kind, size), times in self.stats.moves.items():
            ids, best = self._ids([0] * size, size), float("inf")
            pages = jax.device_put(np.zeros((size, *self._buffer.shape[1:]), self._buffer.dtype), self._pages)
            for _ in range(5):
                jax.block_until_ready((kv_pages, pages))
                start = time.perf_counter()
                result = program(kind, size)(kv_pages, ids) if kind == "save" else program(kind, size)(kv_pages, ids, pages)
                jax.block_until_ready(result)
                best = min(best, time.perf_counter() - start)
                kv_pages = result if kind == "fetch" else kv_pages
            total += times * best
        return total, kv_pages

    def _arrive(self) -> None:
        for slots, pages in self._on_the_way:
            self._buffer[slots] = np.asarray(pages)[: len(slots)]
        self._on_the_way.clear()

    def _parts(self, pairs: Sequence[tuple[int, int]]):
        """Pairs in parts, each with the size of the program that moves it."""
        at = 0
        while at < len(pairs):
            left = len(pairs) - at
            size = next((size for size in self.sizes if size >= left), self.sizes[-1])
            yield pairs[at : at + size], size
            at += size

    def _ids(self, pages: list[int], size: int) -> jax.Array:
        """Padded with page 0, which is nobody's."""
        return jax.device_put(np.asarray(pages + [0] * (size - len(pages)), np.int32), self._whole)

    def _saved_sharding(self) -> NamedSharding:
        """In host memory that the device writes to by itself, where it has such a kind."""
        kinds = {memory.kind for memory in self._mesh.devices.flat[0].addressable_memories()}
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        return self._pages if on_cpu or "pinned_host" not in kinds else self._pages.with_memory_kind("pinned_host")


def _gather(kv_pages: jax.Array, ids: jax.Array, *, num_pages: int) -> jax.Array:
    """[n, layers, ...] of [layers * num_pages, ...]."""
    return jnp.moveaxis(kv_pages.reshape(-1, num_pages, *kv_pages.shape[1:])[:, ids], 1, 0)


def _scatter(kv_pages: jax.Array, ids: jax.Array, pages: jax.Array, *, num_pages: int) -> jax.Array:
    """Page by page, in place."""
    by_layer = kv_pages.reshape(-1, num_pages, *kv_pages.shape[1:])
    put = lambda i, all: jax.lax.dynamic_update_slice_in_dim(all, pages[i][:, None], ids[i], axis=1)
    return jax.lax.fori_loop(0, len(ids), put, by_layer).reshape(kv_pages.shape)
