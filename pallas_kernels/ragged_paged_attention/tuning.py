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
    rows, keys = max(16, 1 << (group - 1).bit_length()), _room(head_dim, dtype)[1]
    return GpuBlocks(rows, keys, 4, 3 if keys == 64 else 2)


def chunk_blocks(group: int, head_dim: int, dtype, tokens: int) -> GpuBlocks:
    """As many rows as there is room for, and no more than the heads of all tokens."""
    room, keys = _room(head_dim, dtype)
    needed = 1 << (group * min(tokens, room) - 1).bit_length()
    rows = max(16, 1 << (group - 1).bit_length(), min(room, needed))
    return GpuBlocks(rows, keys, 8 if rows * head_dim > 64 * 64 else 4, 2)


def _room(head_dim: int, dtype) -> tuple[int, int]:
    """Rows of queries, and keys, that a block has registers and shared memory for: 99 KiB are on every GPU since sm_80."""
    if jnp.dtype(dtype).itemsize == 2:
        return (128, 64) if head_dim <= 128 else (64, 32)
    return (64, 32) if head_dim <= 128 else (32, 16)


def decode_splits(most_keys: int, keys: int) -> tuple[int, int]:
    """Into how many parts a sequence's keys are split, and how many each has: 512 at least, and 32 parts at most."""
    split = -(-max(_KEYS, -(-most_keys // 32)) // keys) * keys
    return -(-most_keys // split), split
