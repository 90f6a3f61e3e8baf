"""Lists of work for a grid, made from lengths."""

import jax
import jax.numpy as jnp


def expand(numbers: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A list with numbers[n] entries for each n: the n of each and its place among them (entries past the last repeat it), and
    how many there are [1]."""
    ends = jnp.cumsum(numbers)
    entry = jnp.minimum(jnp.arange(most, dtype=jnp.int32), jnp.maximum(ends[-1] - 1, 0))
    owner = jnp.minimum(jnp.sum(entry[:, None] >= ends, axis=1, dtype=jnp.int32), len(numbers) - 1)
    return owner, entry - (ends - numbers)[owner], ends[-1:].astype(jnp.int32)


def token_places(tokens: int, page_table, kv_lens, query_starts, counts, num_pages: int, page_size: int) -> tuple[jax.Array, jax.Array]:
    """The page and the slot in it of each of so many new tokens, int32 [tokens]; the page of padding is `num_pages`."""
    rows = jnp.arange(tokens, dtype=jnp.int32)
    sequence = jnp.sum(rows[:, None] >= query_starts[1:], axis=1, dtype=jnp.int32)
    valid = sequence < counts[1]
    sequence = jnp.where(valid, sequence, 0)
    position = kv_lens[sequence] - query_starts[sequence + 1] + rows
    return jnp.where(valid, page_table[sequence, position // page_size], num_pages), position % page_size
