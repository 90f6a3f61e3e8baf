"""Block sizes of the kernels: a heuristic; where a chip has been tuned for, a table would come before it."""

import jax.numpy as jnp

_KEYS = 512  # tokens of the cache in a block: enough for the copies to hide behind one another
_BLOCK_BYTES = 2 * 2**20  # of keys and values; there are two such blocks in a chip's vector memory
_STATE_ROWS = 4096  # rows of float32 running sums


def pages_per_block(page_size: int, num_kv_heads: int, head_dim: int, dtype) -> int:
    """Pages that are fetched and attended to at a time."""
    page_bytes = 2 * num_kv_heads * page_size * head_dim * jnp.dtype(dtype).itemsize
    return max(1, min(_KEYS // page_size, _BLOCK_BYTES // page_bytes))


def queries_per_block(num_heads: int, tokens: int) -> int:
    """Query tokens that are attended for at a time: a multiple of 16, the rows of a bfloat16 tile."""
    return min(max(16, min(128, _STATE_ROWS // num_heads) // 16 * 16), -(-tokens // 16) * 16)
