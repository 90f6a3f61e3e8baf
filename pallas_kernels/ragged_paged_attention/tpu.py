"""The op as Mosaic kernels for TPU, in three launches: new keys and values go into their pages; decode; chunks of prompts.

Pages stay in HBM; each kernel copies what it needs into vector memory itself, the next block while it computes on this one.
`interpret` runs them on any machine, slowly (`pltpu.InterpretParams`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.items import expand
from pallas_kernels.ragged_paged_attention.stored import LIMITS, as_stored
from pallas_kernels.ragged_paged_attention.tuning import LANES, VMEM_BYTES, TpuBlocks, Work, tile_rows, tpu_blocks

_MASKED = -1e30  # finite: a block in which a row sees nothing must not make NaN
_WAVE = 32  # pieces of pages that are rewritten at a time


def ragged_paged_attention_tpu(
    q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, *, scale, window, softcap, sinks, decode_only,
    tuned=None, interpret=False,
):  # fmt: skip
    """See `api.ragged_paged_attention`."""
    tokens, num_heads, _ = q.shape
    tile = tile_rows(kv_pages.dtype)
    if kv_pages.shape[3] % tile:
        raise ValueError(f"page_size {kv_pages.shape[3]} is not a multiple of {tile}, as TPU tiles of {kv_pages.dtype} need")
    kv_pages = _write(k, v, kv_pages, page_table, kv_lens, query_starts, counts, decode_only=decode_only, interpret=interpret)
    sinks = jnp.full(num_heads, _MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    sinks = jnp.broadcast_to(sinks[:, None], (num_heads, LANES))
    options = dict(scale=scale, window=window, softcap=softcap, tuned=tuned, interpret=interpret)
    out = _decode(q, kv_pages, page_table, kv_lens, counts, sinks, **options)
    rows = jnp.arange(tokens)[:, None, None]
    if decode_only:
        return jnp.where(rows < counts[0], out, 0), kv_pages
    chunks = _chunks(q, kv_pages, page_table, kv_lens, query_starts, counts, sinks, **options)
    written = (rows >= counts[0]) & (rows < query_starts[counts[1]])
    return jnp.where(rows < counts[0], out, jnp.where(written, chunks, 0)), kv_pages


# New keys and values. A tile of a page is the least that can be written: it is read, the new rows are put in, it goes back.


def _write(k, v, kv_pages, page_table, kv_lens, query_starts, counts, *, decode_only, interpret):
    tokens, num_kv_heads, head_dim = k.shape
    sequences, page_size, tile = page_table.shape[0], kv_pages.shape[3], tile_rows(kv_pages.dtype)
    new = as_stored(jnp.concatenate([k, v], axis=1), kv_pages.dtype).astype(jnp.float32)  # of 4 bytes a row can be taken from a tile
    fresh = 1 if decode_only else tile  # rows that are new in a tile at most
    pad = 0 if decode_only else tile
    new = jnp.pad(new, ((pad, pad), (0, 0), (0, 0)))

    count = jnp.where(jnp.arange(sequences) < counts[1], query_starts[1:] - query_starts[:-1], 0)
    start = kv_lens - count
    first_tile = start // tile
    tiles = jnp.where(count > 0, (kv_lens - 1) // tile - first_tile + 1, 0)
    most = sequences if decode_only else tokens // tile + 2 * sequences
    most = -(-most // _WAVE) * _WAVE
    n, place, total = expand(tiles, most)
    position = (first_tile[n] + place) * tile
    page, row = page_table[n, position // page_size], position % page_size
    first, last = jnp.maximum(start[n] - position, 0), jnp.minimum(kv_lens[n] - position, tile)
    token = query_starts[n] if decode_only else query_starts[n] + position - start[n] + pad
    scalars = [x.astype(jnp.int32) for x in (page, row, first, last, token)]

    tile_bytes = 2 * num_kv_heads * tile * head_dim * kv_pages.dtype.itemsize
    pieces = sequences if decode_only else tokens // tile + sequences  # a sequence begins and ends within a tile
    moved = pieces * (2 * tile_bytes + 2 * num_kv_heads * fresh * head_dim * 4)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_write_kernel, tile=tile, fresh=fresh, heads=num_kv_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(most // _WAVE,),
            in_specs=[whole, whole],
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((_WAVE, fresh, 2 * num_kv_heads, head_dim), jnp.float32),
                pltpu.VMEM((_WAVE, 2, num_kv_heads, tile, head_dim), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((3, _WAVE)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={7: 0},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_kv_pages",
    )(*scalars, total, new, kv_pages)


def _write_kernel(page, row, first, last, token, total, new, _, pages, fresh_rows, tiles, done, *, tile, fresh, heads):
    wave = pl.program_id(0) * _WAVE
    here = jnp.clip(total[0] - wave, 0, _WAVE)

    def place(i):
        return pages.at[page[wave + i], :, :, pl.ds(pl.multiple_of(row[wave + i], tile), tile), :]

    def rows_in(i):
        return pltpu.make_async_copy(new.at[pl.ds(token[wave + i], fresh)], fresh_rows.at[i], done.at[0, i])

    def tile_in(i):
        return pltpu.make_async_copy(place(i), tiles.at[i], done.at[1, i])

    def tile_out(i):
        return pltpu.make_async_copy(tiles.at[i], place(i), done.at[2, i])

    def read(i, _):
        rows_in(i).start()
        tile_in(i).start()

    def merge(i, _):
        rows_in(i).wait()
        tile_in(i).wait()
        slot = jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        is_new = (slot >= first[wave + i]) & (slot < last[wave + i])
        for head in range(heads):
            for part in range(2):
                new_rows = jnp.broadcast_to(fresh_rows[i, :, part * heads + head, :], (tile, tiles.shape[-1]))
                old_rows = tiles[i, part, head].astype(jnp.float32)
                tiles[i, part, head] = jnp.where(is_new, new_rows, old_rows).astype(tiles.dtype)
        tile_out(i).start()

    def finish(i, _):
        tile_out(i).wait()

    for action in (read, merge, finish):
        jax.lax.fori_loop(0, here, action, None)


# Attention of some query rows over one block of keys and values, the same for decode and for chunks.


def _attend_block(h, rows, queries, kv, visible, in_range, top, total, out, *, scale, softcap):
    """Adds a block of keys to the running softmax of kv head h (Dao et al., arXiv 2205.14135).

    queries [R, D], in the type of the products; kv [pages, 2, heads, page_size, D], a block in vector memory; visible [R, keys];
    in_range [keys, 1]: whether the key is the sequence's. `rows` are those of the running maximum `top`, sum `total` (their lanes
    all alike) and sum `out`.
    """
    keys, values = (kv[:, part, h].reshape(-1, kv.shape[-1]).astype(queries.dtype) for part in (0, 1))
    precision = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores = product(queries, keys, (((1,), (1,)), ((), ()))) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, _MASKED)
    old_top = top[rows, :1]
    new_top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
    keep = jnp.exp(old_top - new_top)
    values = jnp.where(in_range, values.astype(jnp.float32), 0.0).astype(values.dtype)  # 0 * NaN must not reach the sum
    mixed = product(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
    out[rows] = out[rows] * keep + mixed
    total[rows] = total[rows] * keep + jnp.sum(weights, axis=-1, keepdims=True)
    top[rows] = jnp.broadcast_to(new_top, (new_top.shape[0], LANES))


def _product_type(q, pages):
    """The pages' own, but of pages of a byte a number the queries'."""
    return q.dtype if pages.dtype in LIMITS else pages.dtype


def _fetch(action, pages, table, n, first_page, num_pages, block, buffer, done):
    """Starts, or waits for, the copies of a block's pages, of those from first_page to num_pages - 1."""
    per_block = buffer.shape[0]

    def one(i, _):
        getattr(pltpu.make_async_copy(pages.at[table[n, i]], buffer.at[i - block * per_block], done), action)()

    jax.lax.fori_loop(jnp.maximum(block * per_block, first_page), jnp.minimum((block + 1) * per_block, num_pages), one, None)


def _start_state(sinks, rows_each, top, total, out):
    """A sink is a key that every query sees, with its own logit and no value."""
    for head in range(sinks.shape[0]):
        rows = pl.ds(head * rows_each, rows_each)
        sink = jnp.broadcast_to(sinks[pl.ds(head, 1)], (rows_each, LANES))
        top[rows] = sink
        total[rows] = jnp.where(sink > _MASKED, 1.0, 0.0)
    out[...] = jnp.zeros_like(out)


# Decode: a token a sequence. A step of the grid is a sequence; the copies run ahead from one sequence into the next.


def _decode(q, kv_pages, page_table, kv_lens, counts, sinks, *, scale, window, softcap, tuned=None, interpret):
    tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    sequences = page_table.shape[0]
    if tokens < sequences:
        q = jnp.pad(q, ((0, sequences - tokens), (0, 0), (0, 0)))
    keys = page_table.shape[1] * page_size
    block = pl.BlockSpec((1, num_heads, head_dim), lambda n, *_: (n, 0, 0))
    out = pl.pallas_call(
        partial(_decode_kernel, scale=scale, window=window, softcap=softcap, heads=num_kv_heads, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(sequences,),
            in_specs=[block, pl.BlockSpec((num_heads, LANES), lambda n, *_: (0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                *_buffers(kv_pages, page_table, tpu_blocks(Work.of("decode", q, kv_pages), tuned)),
                pltpu.SMEM((1,), jnp.int32),
                *_state(num_heads, head_dim),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((sequences, num_heads, head_dim), q.dtype),
        cost_estimate=_cost(q, kv_pages, keys, 1, sequences, window),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="paged_attention_decode",
    )(page_table, kv_lens, counts, q[:sequences], sinks, kv_pages)
    return out[:tokens] if tokens <= sequences else jnp.pad(out, ((0, tokens - sequences), (0, 0), (0, 0)))


def _decode_kernel(
    table, kv_lens, counts, q, sinks, pages, o, buffers, done, turn, top, total, out, *, scale, window, softcap, heads, page_size
):
    n, group = pl.program_id(0), q.shape[1] // heads
    block_keys = buffers.shape[1] * page_size

    def first_key(n):
        return 0 if window is None else jnp.maximum(kv_lens[n] - window, 0)

    def fetch(action, n, block, slot):
        _fetch(action, pages, table, n, first_key(n) // page_size, pl.cdiv(kv_lens[n], page_size), block, buffers.at[slot], done.at[slot])

    @pl.when(n >= counts[0])
    def _():
        o[...] = jnp.zeros_like(o)

    @pl.when((n == 0) & (counts[0] > 0))
    def _():
        turn[0] = 0
        fetch("start", 0, first_key(0) // block_keys, 0)

    @pl.when(n < counts[0])
    def _():
        _start_state(sinks, 1, top, total, out)
        first, last = first_key(n), kv_lens[n]
        blocks = pl.cdiv(last, block_keys)

        def attend(block, _):
            slot = turn[0]

            @pl.when(block + 1 < blocks)
            def _():
                fetch("start", n, block + 1, 1 - slot)

            @pl.when((block + 1 == blocks) & (n + 1 < counts[0]))
            def _():
                fetch("start", n + 1, first_key(n + 1) // block_keys, 1 - slot)

            fetch("wait", n, block, slot)
            position = lambda shape, axis: block * block_keys + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            seen = lambda p: (p >= first) & (p < last)
            visible, in_range = seen(position((group, block_keys), 1)), seen(position((block_keys, 1), 0))
            queries = q[0].astype(jnp.float32)
            for h in range(heads):
                rows = pl.ds(h * group, group)
                mine = queries[h * group : (h + 1) * group].astype(_product_type(q, buffers))
                _attend_block(h, rows, mine, buffers.at[slot], visible, in_range, top, total, out, scale=scale, softcap=softcap)
            turn[0] = 1 - slot

        jax.lax.fori_loop(first // block_keys, blocks, attend, None)
        o[0] = (out[...] / total[:, :1]).astype(o.dtype)


# Chunks: an item is a block of query rows with one of the sequences in it; blocks in which sequences meet come once for each.


def _chunks(q, kv_pages, page_table, kv_lens, query_starts, counts, sinks, *, scale, window, softcap, tuned=None, interpret):
    tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    sequences = page_table.shape[0]
    sizes = tpu_blocks(Work.of("chunks", q, kv_pages), tuned)
    size = min(sizes.queries, -(-tokens // 16) * 16)
    padded = -(-tokens // size) * size
    by_head = jnp.pad(q, ((0, padded - tokens), (0, 0), (0, 0))).transpose(1, 0, 2)

    n = jnp.arange(sequences)
    begin, end = query_starts[:-1], query_starts[1:]
    blocks = jnp.where((n >= counts[0]) & (n < counts[1]) & (end > begin), (end - 1) // size - begin // size + 1, 0)
    most = padded // size + sequences
    owner, place, total = expand(blocks, most)
    item_block = jnp.clip(begin[owner] // size + place, 0, padded // size - 1).astype(jnp.int32)

    block = pl.BlockSpec((num_heads, size, head_dim), lambda i, blocks, *_: (0, blocks[i], 0))
    keys = page_table.shape[1] * page_size
    out = pl.pallas_call(
        partial(_chunk_kernel, scale=scale, window=window, softcap=softcap, heads=num_kv_heads, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(most,),
            in_specs=[block, pl.BlockSpec((num_heads, LANES), lambda i, *_: (0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                *_buffers(kv_pages, page_table, sizes),
                *_state(num_heads * size, head_dim),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(by_head.shape, q.dtype),
        cost_estimate=_cost(q, kv_pages, keys, size, padded // size, window),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="paged_attention_chunks",
    )(item_block, owner, total, page_table, kv_lens, query_starts, by_head, sinks, kv_pages)
    return out.transpose(1, 0, 2)[:tokens]


def _chunk_kernel(
    item_block, owner, items, table, kv_lens, query_starts, q, sinks, pages, o, buffers, done, top, total, out,
    *, scale, window, softcap, heads, page_size,
):  # fmt: skip
    i = pl.program_id(0)
    num_heads, size, head_dim = q.shape
    group, block_keys = num_heads // heads, buffers.shape[1] * page_size

    @pl.when((i == 0) | (item_block[i] != item_block[jnp.maximum(i - 1, 0)]))
    def _():
        o[...] = jnp.zeros_like(o)

    @pl.when(i < items[0])
    def _():
        n = owner[i]
        begin, end, row = query_starts[n], query_starts[n + 1], item_block[i] * size
        shift = kv_lens[n] - end  # from a row's number to its position
        first_row, last_row = jnp.maximum(row, begin), jnp.minimum(row + size, end) - 1
        first = 0 if window is None else jnp.maximum(first_row + shift - window + 1, 0)
        last = last_row + shift + 1

        def fetch(action, block, slot):
            bounds = first // page_size, pl.cdiv(last, page_size)
            _fetch(action, pages, table, n, *bounds, block, buffers.at[slot], done.at[slot])

        # Rows of one kv head: its query heads one after the other, each with all rows of the block.
        positions = row + shift + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (group * size, 1), 0), size)
        _start_state(sinks, size, top, total, out)
        start, stop = first // block_keys, pl.cdiv(last, block_keys)
        fetch("start", start, start % 2)

        def attend(block, _):
            slot = block % 2

            @pl.when(block + 1 < stop)
            def _():
                fetch("start", block + 1, 1 - slot)

            fetch("wait", block, slot)
            key = lambda shape, axis: block * block_keys + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            keys = key((group * size, block_keys), 1)
            visible = (keys <= positions) & (keys < last)
            if window is not None:
                visible &= keys > positions - window
            in_range = (key((block_keys, 1), 0) >= first) & (key((block_keys, 1), 0) < last)
            for h in range(heads):
                rows = pl.ds(h * group * size, group * size)
                mine = q[pl.ds(h * group, group)].reshape(group * size, head_dim).astype(_product_type(q, buffers))
                _attend_block(h, rows, mine, buffers.at[slot], visible, in_range, top, total, out, scale=scale, softcap=softcap)

        jax.lax.fori_loop(start, stop, attend, None)
        rows = row + jax.lax.broadcasted_iota(jnp.int32, o.shape, 1)
        sums = jnp.where(total[:, :1] == 0, 1.0, total[:, :1])
        result = (out[...] / sums).reshape(o.shape).astype(o.dtype)
        o[...] = jnp.where((rows >= begin) & (rows < end), result, o[...])


def _buffers(kv_pages: jax.Array, page_table: jax.Array, sizes: TpuBlocks) -> list:
    """Two blocks of pages, one to compute on while the other is filled, and what tells when each is."""
    pages = min(sizes.pages, page_table.shape[1])
    return [pltpu.VMEM((2, pages, *kv_pages.shape[1:]), kv_pages.dtype), pltpu.SemaphoreType.DMA((2,))]


def _state(rows: int, head_dim: int) -> list:
    """The running softmax: maximum, sum of weights, sum of values."""
    return [pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((rows, head_dim), jnp.float32)]


def _cost(q: jax.Array, kv_pages: jax.Array, keys: int, queries: int, items: int, window: int | None) -> pl.CostEstimate:
    """Of `items`, each with so many queries and keys: all that the shapes have room for. Bytes are those that copies move: whole
    pages, and with a window on average one page more than it is wide."""
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    seen, copied = keys, keys
    if window is not None:
        seen, copied = min(keys, window), min(keys, window + queries - 1 + page_size - 1)
    return pl.CostEstimate(
        flops=4 * items * seen * queries * num_heads * head_dim,
        transcendentals=items * seen * queries * num_heads,
        bytes_accessed=2 * items * copied * num_kv_heads * head_dim * kv_pages.dtype.itemsize
        + 2 * items * queries * num_heads * head_dim * q.dtype.itemsize
        + num_heads * LANES * 4,  # sinks
    )
