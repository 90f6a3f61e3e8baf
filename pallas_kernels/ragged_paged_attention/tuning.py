"""Block sizes of the kernels: those that a table has for the work, measured on the chip (`tables.py`), else a heuristic.

Nothing here knows how many tokens or sequences there are: a row's bits must not depend on what shares its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from pallas_kernels.ragged_paged_attention.tables import Table

LANES = 128  # of a TPU: the last axis of its tiles
VMEM_BYTES = 32 * 2**20  # of a TPU's vector memory, for a kernel
SHARED_BYTES = 99 * 2**10  # of a GPU's shared memory, which every one since sm_80 has for a block
_KEYS = 512  # tokens of the cache in a block: enough for the copies to hide behind one another
_BLOCK_BYTES = 2 * 2**20  # of keys and values; there are two such blocks in a chip's vector memory
_STATE_ROWS = 4096  # rows of float32 running sums
_PARTS = 32  # that a sequence's keys are split into at most


class Work(NamedTuple):
    """What sizes are chosen for: a kernel ("decode" or "chunks") and what a device has of the heads, pages `width` wide, types of the
    queries and of the pages."""

    kernel: str
    heads: int
    kv_heads: int
    width: int
    page_size: int
    dtype: str
    kv_dtype: str

    @classmethod
    def of(cls, kernel: str, q, kv_pages) -> Work:
        """q [T, Hq, W], kv_pages [pages, 2, Hk, page_size, W]: arrays, or their shapes and types."""
        _, _, kv_heads, page_size, width = kv_pages.shape
        return cls(kernel, q.shape[1], kv_heads, width, page_size, jnp.dtype(q.dtype).name, jnp.dtype(kv_pages.dtype).name)

    @property
    def group(self) -> int:
        """Query heads that share their keys."""
        return self.heads // self.kv_heads


class TpuBlocks(NamedTuple):
    """Of a TPU kernel: pages that are fetched and attended to at a time, and query tokens (1 in decode, else a multiple of 16, the
    rows of a bfloat16 tile)."""

    pages: int
    queries: int


class GpuBlocks(NamedTuple):
    """Of a GPU kernel: rows of queries and keys in a block (powers of two, 16 at least), warps, and stages of its pipeline; and in
    decode the keys that a part of a sequence has at least (else 0)."""

    rows: int
    keys: int
    warps: int
    stages: int
    split: int = 0


def tile_rows(dtype) -> int:
    """Rows of a TPU tile: the least that can be written to a page on its own."""
    return 32 // jnp.dtype(dtype).itemsize


def tpu_blocks(work: Work, tuned: Table | None = None) -> TpuBlocks:
    return _tuned(work, tuned, TpuBlocks) or _tpu_heuristic(work)


def gpu_blocks(work: Work, tuned: Table | None = None) -> GpuBlocks:
    return _tuned(work, tuned, GpuBlocks) or _gpu_heuristic(work)


def _tuned(work: Work, tuned: Table | None, kind: type):
    blocks = None if tuned is None else tuned.find(work)
    if blocks is not None and not isinstance(blocks, kind):
        raise ValueError(f"the table of block sizes for {tuned.device_kind} has {type(blocks).__name__}, and {kind.__name__} are needed")
    return blocks


def _tpu_heuristic(work: Work) -> TpuBlocks:
    pages = max(1, min(_KEYS // work.page_size, _BLOCK_BYTES // _page_bytes(work)))
    return TpuBlocks(pages, 1 if work.kernel == "decode" else max(16, min(128, _STATE_ROWS // work.heads) // 16 * 16))


def _gpu_heuristic(work: Work) -> GpuBlocks:
    """As many rows and keys as a block has registers and shared memory for."""
    if jnp.dtype(work.dtype).itemsize == 2:
        room, keys = (128, 64) if work.width <= 128 else (64, 32)
    else:
        room, keys = (64, 32) if work.width <= 128 else (32, 16)
    if work.kernel == "decode":
        return GpuBlocks(_least_rows(work.group), keys, 4, 3 if keys == 64 else 2, _KEYS)
    rows = max(room, _least_rows(work.group))
    return GpuBlocks(rows, keys, _most_warps(rows, work.width), 2)


def _least_rows(group: int) -> int:
    """A block has all query heads that share keys, and no fewer rows than a matrix product of a GPU has."""
    return max(16, 1 << (group - 1).bit_length())


def _most_warps(rows: int, width: int) -> int:
    return 8 if rows * width > 64 * 64 else 4


def fewer_rows(blocks: GpuBlocks, work: Work, tokens: int) -> GpuBlocks:
    """No more rows than the heads of all tokens: how many rows a block has changes no row's bits."""
    rows = min(blocks.rows, max(_least_rows(work.group), 1 << (work.group * min(tokens, blocks.rows) - 1).bit_length()))
    return blocks if rows == blocks.rows else blocks._replace(rows=rows, warps=min(blocks.warps, _most_warps(rows, work.width)))


def decode_splits(most_keys: int, blocks: GpuBlocks) -> tuple[int, int]:
    """Into how many parts a sequence's keys are split, 32 at most, and how many each has."""
    split = -(-max(blocks.split, -(-most_keys // _PARTS)) // blocks.keys) * blocks.keys
    return -(-most_keys // split), split


def why_illegal(work: Work, blocks: TpuBlocks | GpuBlocks) -> str | None:
    """Why a kernel cannot have such blocks; None if nothing is known against them (a compiler may still find something)."""
    if any(type(number) is not int or number < 0 for number in blocks):
        return f"{blocks} must be whole numbers"
    on_tpu = isinstance(blocks, TpuBlocks)
    if blocks == (_tpu_heuristic if on_tpu else _gpu_heuristic)(work):
        return None  # it is what runs without a table
    return _why_illegal_tpu(work, blocks) if on_tpu else _why_illegal_gpu(work, blocks)


def _why_illegal_tpu(work: Work, blocks: TpuBlocks) -> str | None:
    if blocks.pages < 1:
        return "a block has at least one page"
    if (blocks.queries != 1) if work.kernel == "decode" else (blocks.queries < 16 or blocks.queries % 16):
        return f"{blocks.queries} queries: decode has 1, chunks have a multiple of 16"
    item, rows = jnp.dtype(work.dtype).itemsize, work.heads * blocks.queries
    keys = blocks.pages * work.page_size
    held = 2 * blocks.pages * _page_bytes(work)  # one is filled while the other is computed with
    held += 2 * 2 * rows * work.width * item + rows * (2 * LANES + work.width) * 4  # queries and results, both twice; running sums
    held += work.group * blocks.queries * keys * 4  # scores of a key/value head
    if held > VMEM_BYTES:
        return f"{blocks} need {held >> 20} MiB of vector memory, and there are {VMEM_BYTES >> 20}"
    return None


def _why_illegal_gpu(work: Work, blocks: GpuBlocks) -> str | None:
    power = lambda n: n > 0 and n & (n - 1) == 0
    if not power(blocks.rows) or blocks.rows < _least_rows(work.group):
        return f"{blocks.rows} rows: a power of two and at least {_least_rows(work.group)} are needed for {work.group} heads to a key"
    if work.kernel == "decode" and blocks.rows != _least_rows(work.group):
        return f"{blocks.rows} rows: decode has {_least_rows(work.group)} for {work.group} heads to a key"
    if not power(blocks.keys) or blocks.keys < 16:
        return f"{blocks.keys} keys: a power of two and at least 16 are needed"
    if not power(blocks.warps) or blocks.warps > 16:
        return f"{blocks.warps} warps: a power of two up to 16 is needed"
    if not 1 <= blocks.stages <= 8:
        return f"{blocks.stages} stages: 1 to 8 are needed"
    if (blocks.split < blocks.keys) if work.kernel == "decode" else blocks.split:
        return f"a split of {blocks.split}: decode has at least its {blocks.keys} keys, chunks have none"
    width, item = 1 << (work.width - 1).bit_length(), jnp.dtype(work.dtype).itemsize
    held = (blocks.rows + 2 * blocks.keys * max(1, blocks.stages - 1)) * width * item
    if held > SHARED_BYTES:
        return f"{blocks} need {held >> 10} KiB of shared memory, and there are {SHARED_BYTES >> 10}"
    return None


def _page_bytes(work: Work) -> int:
    return 2 * work.kv_heads * work.page_size * work.width * jnp.dtype(work.kv_dtype).itemsize
