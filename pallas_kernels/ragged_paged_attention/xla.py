"""The op in plain XLA: the CPU's backend, and every other platform's until it has a kernel of its own.

Both phases run one routine (`_flash`) over blocks: eight sequences by one query for decode, one sequence by `_QUERY_BLOCK`
queries for prefill. It walks the keys in chunks that start at multiples of the chunk size, with an online softmax (Dao et
al., arXiv 2205.14135), and its loops run only as far as the sequences really reach: cost follows the tokens that are there,
not the shapes (`loop_trips` says how often each runs, by its name). Because chunk boundaries depend on positions alone, a
row's result does not depend on what shares its batch.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.items import token_places
from pallas_kernels.ragged_paged_attention.stored import as_stored
from pallas_kernels.row_sum import row_sum

_SEQUENCE_BLOCK = 8
_QUERY_BLOCK = 64
_KEY_CHUNK = 128
_COLUMNS = 64
_MASKED = -1e30  # finite: a chunk in which a row sees nothing must not make NaN


def ragged_paged_attention_xla(q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, *, scale, window, softcap, sinks, decode_only):
    """See `api.ragged_paged_attention`."""
    kv_pages = write_kv(k, v, kv_pages, page_table, kv_lens, query_starts, counts)
    tokens, heads, head_dim = q.shape
    sequences, page_size = page_table.shape[0], kv_pages.shape[3]
    chunk_pages = max(1, _KEY_CHUNK // page_size)
    chunk = chunk_pages * page_size
    queries = min(_QUERY_BLOCK, tokens)
    block = min(_SEQUENCE_BLOCK, sequences)
    # Blocks may reach past the last token, sequence or page: pad so that no slice is clamped.
    out = jnp.zeros((tokens + max(queries, block), heads, head_dim), q.dtype)
    q = jnp.pad(q, ((0, max(queries, block)), (0, 0), (0, 0)))
    page_table = jnp.pad(page_table, ((0, block), (0, -page_table.shape[1] % chunk_pages)))
    kv_lens = jnp.pad(kv_lens, (0, block))
    num_decode, num_sequences = counts[0], counts[1]

    def attend(q, positions, table, lens, first, last):
        """[B, Q, Hq, D] queries at `positions` [B, Q] (-1: padding), over the chunks that hold positions first to last."""
        start = 0 if window is None else jnp.maximum(0, first - window + 1) // chunk
        return _flash(q, positions, kv_pages, table, lens, start, last // chunk + 1, chunk_pages, scale, window, softcap, sinks)

    def decode(b, out):
        first = b * block
        lens = jax.lax.dynamic_slice_in_dim(kv_lens, first, block)
        positions = jnp.where(first + jnp.arange(block) < num_decode, lens - 1, -1)
        shortest = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions))
        o = attend(
            jax.lax.dynamic_slice_in_dim(q, first, block)[:, None],
            positions[:, None],
            jax.lax.dynamic_slice_in_dim(page_table, first, block),
            lens,
            shortest,
            jnp.max(positions),
        )
        return jax.lax.dynamic_update_slice_in_dim(out, o[:, 0], first, 0)

    def prefill(n, out):
        count, kv_len = query_starts[n + 1] - query_starts[n], kv_lens[n]
        table = jax.lax.dynamic_slice_in_dim(page_table, n, 1)

        def one_block(b, out):
            row, offsets = query_starts[n] + b * queries, b * queries + jnp.arange(queries)
            positions = jnp.where(offsets < count, kv_len - count + offsets, -1)
            rows = jax.lax.dynamic_slice_in_dim(q, row, queries)
            o = attend(rows[None], positions[None], table, kv_len[None], positions[0], jnp.max(positions))
            # Rows past the sequence's end are garbage, and the next sequence's blocks overwrite them.
            return jax.lax.dynamic_update_slice_in_dim(out, o[0], row, 0)

        with jax.named_scope("query_blocks"):
            return jax.lax.fori_loop(0, (count + queries - 1) // queries, one_block, out)

    with jax.named_scope("decode_blocks"):
        out = jax.lax.fori_loop(0, (num_decode + block - 1) // block, decode, out)
    if not decode_only:
        with jax.named_scope("prompts"):
            out = jax.lax.fori_loop(num_decode, num_sequences, prefill, out)
    return out[:tokens], kv_pages


def write_kv(k, v, kv_pages, page_table, kv_lens, query_starts, counts):
    """Scatters k and v [T, Hk, D] into their pages; padding tokens go nowhere."""
    page, slot = token_places(len(k), page_table, kv_lens, query_starts, counts, kv_pages.shape[0], kv_pages.shape[3])
    kv = as_stored(jnp.stack([k, v], axis=1), kv_pages.dtype)
    return kv_pages.at[page, :, :, slot].set(kv, mode="drop")


def _flash(q, positions, kv_pages, table, kv_lens, start, stop, chunk_pages, scale, window, softcap, sinks):
    """Attention of q [B, Q, Hq, D] over chunks start to stop of each sequence's pages, in float32."""
    batch, queries, heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = kv_pages.shape
    group, chunk = heads // kv_heads, chunk_pages * page_size
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    rows = group * queries  # [B, Hk, G * Q, D]: a matrix product for each key/value head
    qh = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, head_dim)
    qh = qh.astype(jnp.float32)
    row_positions = jnp.tile(positions, (1, group))[:, None, :, None]
    if rows == 1:  # XLA's CPU backend adds the terms of a product with one row in another order than with more
        qh, row_positions, rows = jnp.repeat(qh, 2, axis=2), jnp.repeat(row_positions, 2, axis=2), 2

    # With AVX-512 the order in which it adds depends on the number of rows, but for columns that fill its registers.
    columns = -(-head_dim // _COLUMNS) * _COLUMNS

    def step(c, carry):
        top, total, out = carry
        pages = jax.lax.dynamic_slice_in_dim(table, c * chunk_pages, chunk_pages, axis=1)
        key_positions = c * chunk + jnp.arange(chunk)
        # Each gathered by itself and by head: twice as fast here as both at once and then transposed.
        keys, values = (
            kv_pages[pages[:, None], i, jnp.arange(kv_heads)[:, None]].reshape(batch, kv_heads, chunk, head_dim).astype(jnp.float32)
            for i in (0, 1)
        )
        # What lies past a sequence's end was never written by it: 0 * NaN must not reach the sum.
        values = jnp.where((key_positions < kv_lens[:, None])[:, None, :, None], values, 0.0)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, columns - head_dim)))
        scores = jnp.einsum("bhqd,bhcd->bhqc", qh, keys, precision=precision) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = key_positions <= row_positions
        if window is not None:
            seen &= key_positions > row_positions - window
        scores = jnp.where(seen, scores, _MASKED)
        # The barrier keeps XLA from fusing the maximum with the exponential, whose bits would depend on the number of rows.
        new_top = jax.lax.optimization_barrier(jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True)))
        weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        keep = jnp.exp(top - new_top)
        total = total * keep + row_sum(weights)
        out = out * keep + jnp.einsum("bhqc,bhcd->bhqd", weights, values, precision=precision)
        return new_top, total, out

    shape = (batch, kv_heads, rows)
    carry = (jnp.full((*shape, 1), _MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, columns)))
    with jax.named_scope("key_chunks"):
        top, total, out = jax.lax.fori_loop(start, stop, step, carry)
    out = out[..., :head_dim]
    if sinks is not None:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), rows // group, axis=1)[None, :, :, None]
        new_top = jnp.maximum(top, sink)
        keep = jnp.exp(top - new_top)
        total, out = total * keep + jnp.exp(sink - new_top), out * keep
    out = (out / jnp.where(total == 0, 1.0, total))[:, :, : group * queries]
    return out.reshape(batch, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def loop_trips(tokens: int, length: int, page_size: int, *, decode: bool, window: int | None = None) -> dict[str, float]:
    """How often each of the loops above runs, by its name, in the mean: a step of `tokens` tokens, which are as many sequences of `length`
    tokens by now (`decode`), or prompts of that length from their beginning."""
    chunk = max(1, _KEY_CHUNK // page_size) * page_size
    chunks = lambda first, last: last // chunk + 1 - (0 if window is None else max(0, first - window + 1) // chunk)
    if decode:
        return {"decode_blocks": -(-tokens // _SEQUENCE_BLOCK), "key_chunks": chunks(length - 1, length - 1), "prompts": 0}
    length = min(tokens, length)
    queries = min(_QUERY_BLOCK, tokens)
    seen = [chunks(first, min(first + queries, length) - 1) for first in range(0, length, queries)]
    return {"decode_blocks": 0, "prompts": tokens / length, "query_blocks": len(seen), "key_chunks": sum(seen) / len(seen)}
