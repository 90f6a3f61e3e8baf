"""Block sizes of the kernels: a heuristic; where a chip has been tuned for, a table would come before it."""

from typing import NamedTuple

import jax.numpy as jnp

LANES = 128  # of a TPU: the last axis of its tiles
_KEYS = 512  # tokens of the cache in a block: enough for the copies to hide behind one another
_BLOCK_BYTES = 2 * 2**20  # of keys and values; there are two such blocks in a chip's vector memory
_STATE_ROWS = 4096  # rows of float32 running sums


def tile_rows(dtype) -> int:
    """Rows of a TPU tile: the least that can be written to a page on its own."""
    return 32 // jnp.dtype(dtype).itemsize


def pages_per_block(page_size: int, num_kv_heads: int, head_dim: int, dtype) -> int:
    """Pages that are fetched and attended to at a time."""
    page_bytes = 2 * num_kv_heads * page_size * head_dim * jnp.dtype(dtype).itemsize
    return max(1, min(_KEYS // page_size, _BLOCK_BYTES // page_bytes))


def queries_per_block(num_heads: int, tokens: int) -> int:
    """Query tokens that are attended for at a time: a multiple of 16, the rows of a bfloat16 tile."""
    return min(max(16, min(128, _STATE_ROWS // num_heads) // 16 * 16), -(-tokens // 16) * 16)


class GpuBlocks(NamedTuple):
    """Of a GPU kernel: rows of queries and keys in a block (powers of two, 16 at least), warps, and stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def decode_blocks(group: int, head_dim: int, dtype) -> GpuBlocks:
    """`group` query heads share the keys."""
    rows = max(16, 1 << (group - 1).bit_length())
    wide = head_dim * jnp.dtype(dtype).itemsize
    return GpuBlocks(rows, 64 if wide <= 256 else 32, 4, 3 if wide <= 256 else 2)


def chunk_blocks(group: int, head_dim: int, dtype, tokens: int) -> GpuBlocks:
    """As many rows as there can be, up to 128; fewer where their sums would not fit in registers."""
    wide = head_dim * jnp.dtype(dtype).itemsize
    room = 128 if wide <= 256 else 64
    needed = 1 << (group * min(tokens, room) - 1).bit_length()
    rows = max(16, 1 << (group - 1).bit_length(), min(room, needed))
    return GpuBlocks(rows, 64 if wide <= 256 else 32, 8 if rows * head_dim > 64 * 64 else 4, 2)


def decode_splits(most_keys: int, keys: int) -> tuple[int, int]:
    """Into how many parts a sequence's keys are split, and how many each has: 512 at least, and 32 parts at most."""
    split = -(-max(_KEYS, -(-most_keys // 32)) // keys) * keys
    return -(-most_keys // split), split
