"""The op as Pallas kernels for GPUs, lowered through Triton: NVIDIA's sm_80 and later.

Blocks of a GPU's grid run in no order, so new keys and values go into their pages in a launch before. Decode splits each
sequence's keys over blocks, and a last launch adds the parts up (Flash-Decoding, Dao et al. 2023); chunks of prompts have a block for
some query rows with all keys that they see. Query heads that share keys are rows of one matrix product, as many as its 16 rows at
least. Where keys are cut depends on shapes that an engine never changes, so a row's bits do not depend on what shares its batch.

`interpret` runs them on any machine, slowly.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.ragged_paged_attention.items import expand, token_places
from pallas_kernels.ragged_paged_attention.stored import LIMITS, as_stored
from pallas_kernels.ragged_paged_attention.tuning import GpuBlocks, Work, decode_splits, fewer_rows, gpu_blocks

_MASKED = -1e30  # finite: a block in which a row sees nothing must not make NaN
_LOG2_E = math.log2(math.e)  # a GPU has an instruction for 2**x
_WRITTEN = 16  # tokens that a block of the first launch writes


def ragged_paged_attention_gpu(
    q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, *, scale, window, softcap, sinks, decode_only,
    tuned=None, interpret=False,
):  # fmt: skip
    """See `api.ragged_paged_attention`."""
    if q.dtype != kv_pages.dtype and kv_pages.dtype not in LIMITS:
        raise ValueError(f"queries of {q.dtype} over pages of {kv_pages.dtype}: the GPU kernels need them alike, implementation='xla' not")
    if kv_pages.dtype in LIMITS and 2**31 < kv_pages.size <= 2**32:
        raise ValueError(f"Triton miscounts in 2 to 4 GiB of {kv_pages.dtype}, as kv_pages {kv_pages.shape} are: make them fewer or more")
    k, v = as_stored(k, kv_pages.dtype), as_stored(v, kv_pages.dtype)
    kv_pages = _write(k, v, kv_pages, page_table, kv_lens, query_starts, counts, interpret)
    out = jnp.zeros(q.shape, q.dtype)  # each launch fills in its own rows
    options = dict(scale=scale, window=window, softcap=softcap, tuned=tuned, interpret=interpret)
    out = _decode(q, kv_pages, page_table, kv_lens, counts, sinks, out, **options)
    if not decode_only:
        out = _chunks(q, kv_pages, page_table, kv_lens, query_starts, counts, sinks, out, **options)
    return out, kv_pages


def _write(k, v, kv_pages, page_table, kv_lens, query_starts, counts, interpret):
    tokens, heads, head_dim = k.shape
    pages, slots = token_places(tokens, page_table, kv_lens, query_starts, counts, kv_pages.shape[0], kv_pages.shape[3])
    pad = -tokens % _WRITTEN
    pages, slots = jnp.pad(pages, (0, pad), constant_values=kv_pages.shape[0]), jnp.pad(slots, (0, pad))
    moved = 2 * k.size * (k.dtype.itemsize + kv_pages.dtype.itemsize)
    return _call(
        partial(_write_kernel, block=_WRITTEN),
        grid=((tokens + pad) // _WRITTEN, heads),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        aliases={4: 0},
        cost=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        blocks=GpuBlocks(rows=0, keys=0, warps=4, stages=1),
        interpret=interpret,
        name="write_kv_pages",
    )(pages, slots, k, v, kv_pages)


def _write_kernel(pages, slots, k, v, _, out, *, block):
    i, h = pl.program_id(0), pl.program_id(1)
    num_pages, _, _, _, head_dim = out.shape
    tokens, width = k.shape[0], pl.next_power_of_2(head_dim)
    token = i * block + lax.iota(jnp.int32, block)
    page, slot = plgpu.load(pages.at[token]), plgpu.load(slots.at[token])
    token, page, slot = (_column(x, width) for x in (token, page, slot))
    lane = _lanes(block, width)
    mask = (page < num_pages) & (lane < head_dim) & (token < tokens)
    for part, new in enumerate((k, v)):
        plgpu.store(out.at[page, part, h, slot, lane], plgpu.load(new.at[token, h, lane], mask=mask), mask=mask)


def _attend(q, positions, pages, table, n, h, low, high, top, total, out, *, keys, scale, window, softcap):
    """Adds keys low to high - 1 of sequence n, kv head h, to a running softmax in base 2 (Dao et al., arXiv 2205.14135).

    q [R, W], queries at `positions` [R], W the head_dim as a power of two; top, total [R] and out [R, W]: maximum, sum, sum of values.
    """
    rows, width = q.shape
    page_size, head_dim = pages.shape[3:]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    lane = _lanes(keys, width)

    def load(places, mask):
        if pages.dtype == q.dtype:
            return plgpu.load(places, mask=mask, other=0.0)
        return jnp.where(mask, plgpu.load(places, mask=mask).astype(q.dtype), 0.0)  # Triton has no zero of float8

    def step(block, carry):
        top, total, out = carry
        position = block * keys + lax.iota(jnp.int32, keys)
        inside = (position >= low) & (position < high)  # nothing else is read: pages hold garbage past a sequence's end
        page = plgpu.load(table.at[n, lax.div(position, page_size)], mask=inside, other=0)
        page, slot = _column(page, width), _column(lax.rem(position, page_size), width)
        mask = _column(inside, width)
        if width != head_dim:
            mask &= lane < head_dim
        key = load(pages.at[page, 0, h, slot, lane], mask)
        scores = product(q, key, (((1,), (1,)), ((), ())))
        scores = scores * (scale * _LOG2_E) if softcap is None else softcap * _LOG2_E * jnp.tanh(scores * (scale / softcap))
        seen, own = _row(position, rows), _column(positions, keys)
        visible = (seen <= own) & _row(inside, rows)
        if window is not None:
            visible &= seen > own - window
        scores = jnp.where(visible, scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - _column(new_top, keys)), 0.0)
        keep = jnp.exp2(top - new_top)
        value = load(pages.at[page, 1, h, slot, lane], mask)
        mixed = product(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())))
        return new_top, total * keep + jnp.sum(weights, axis=1), out * _column(keep, width) + mixed

    return lax.fori_loop(lax.div(low, keys), lax.div(high + (keys - 1), keys), step, (top, total, out))


# Decode: a token a sequence. A block of the grid is a sequence, a kv head and a part of the keys.


def _decode(q, kv_pages, page_table, kv_lens, counts, sinks, out, *, scale, window, softcap, tuned, interpret):
    tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    sequences, most_keys = page_table.shape[0], page_table.shape[1] * page_size
    blocks = gpu_blocks(Work.of("decode", q, kv_pages), tuned)
    splits, split = decode_splits(most_keys, blocks)
    # With a window, a sequence has keys in a few splits only: those are numbered from the first.
    used = splits if window is None else min(splits, -(-window // split) + 1)
    seen = most_keys if window is None else min(most_keys, window)
    parts = jax.ShapeDtypeStruct((sequences, used, num_heads, head_dim), jnp.float32)
    stats = jax.ShapeDtypeStruct((2, sequences, used, num_heads), jnp.float32)
    part_bytes = 4 * (math.prod(parts.shape) + math.prod(stats.shape))
    row_bytes = min(sequences, tokens) * num_heads * head_dim * q.dtype.itemsize
    read = 2 * sequences * seen * num_kv_heads * head_dim * kv_pages.dtype.itemsize
    results = _call(
        partial(_decode_kernel, blocks=blocks, split=split, scale=scale, window=window, softcap=softcap),
        grid=(sequences, num_kv_heads, used),
        out_shape=(parts, stats),
        cost=_cost(sequences * seen * num_heads, head_dim, read + row_bytes + part_bytes),
        blocks=blocks,
        interpret=interpret,
        name="paged_attention_decode",
    )(counts, kv_lens, page_table, q, kv_pages)
    with_sinks = sinks is not None
    return _call(
        partial(_combine_kernel, split=split, window=window, with_sinks=with_sinks),
        grid=(min(sequences, tokens), num_heads),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        aliases={4 + with_sinks: 0},
        cost=_cost(0, head_dim, part_bytes + row_bytes),
        blocks=GpuBlocks(rows=0, keys=0, warps=1, stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(counts, kv_lens, *results, *([sinks.astype(jnp.float32)] if with_sinks else []), out)


def _first_key(length, window):
    return 0 if window is None else jnp.maximum(length - window, 0)


def _decode_kernel(counts, kv_lens, table, q, pages, parts, stats, *, blocks, split, scale, window, softcap):
    n, h, s = (pl.program_id(i) for i in range(3))
    num_heads, head_dim = q.shape[1:]
    group, width = num_heads // pages.shape[2], pl.next_power_of_2(head_dim)
    length = jnp.where(n < counts[0], kv_lens[n], 0)
    first = _first_key(length, window)
    low = (lax.div(first, split) + s) * split if window is not None else s * split
    low, high = jnp.maximum(low, first), jnp.minimum(low + split, length)
    row, lane = lax.iota(jnp.int32, blocks.rows), _lanes(blocks.rows, width)
    mine = (row < group) & (low < high)
    mask = _column(mine, width) & (lane < head_dim)
    head = jnp.where(mine, h * group + row, num_heads)
    token = jnp.minimum(n, q.shape[0] - 1)  # there may be room for more sequences than tokens
    queries = plgpu.load(q.at[token, _column(head, width), lane], mask=mask, other=0.0)
    state = jnp.full(blocks.rows, _MASKED), jnp.zeros(blocks.rows), jnp.zeros((blocks.rows, width))
    top, total, out = _attend(
        queries, jnp.full(blocks.rows, length - 1, jnp.int32), pages, table, n, h, low, high, *state,
        keys=blocks.keys, scale=scale, window=None, softcap=softcap,
    )  # fmt: skip
    plgpu.store(parts.at[n, s, _column(head, width), lane], out, mask=mask)
    plgpu.store(stats.at[0, n, s, head], top, mask=mine)
    plgpu.store(stats.at[1, n, s, head], total, mask=mine)


def _combine_kernel(counts, kv_lens, parts, stats, *rest, split, window, with_sinks):
    *sinks, _, o = rest
    n, head = pl.program_id(0), pl.program_id(1)
    head_dim = parts.shape[3]
    lane = lax.iota(jnp.int32, pl.next_power_of_2(head_dim))
    alive = n < counts[0]
    length = jnp.where(alive, kv_lens[n], 0)
    used = lax.div(length + (split - 1), split)
    if window is not None:
        used -= lax.div(_first_key(length, window), split)

    def step(s, carry):
        top, total, out = carry
        new_top = jnp.maximum(top, stats[0, n, s, head])
        keep, here = jnp.exp2(top - new_top), jnp.exp2(stats[0, n, s, head] - new_top)
        part = plgpu.load(parts.at[n, s, head, lane], mask=lane < head_dim, other=0.0)
        return new_top, total * keep + stats[1, n, s, head] * here, out * keep + part * here

    # A sink is a key that every query sees, with its own logit and no value.
    top, total = (sinks[0][head] * _LOG2_E, jnp.float32(1)) if with_sinks else (jnp.float32(_MASKED), jnp.float32(0))
    top, total, out = lax.fori_loop(0, used, step, (top, total, jnp.zeros(lane.shape)))
    result = out / jnp.where(total == 0, 1.0, total)
    plgpu.store(o.at[n, head, lane], result.astype(o.dtype), mask=(lane < head_dim) & alive)


# Chunks: an item is some tokens of one sequence; its rows are those tokens' query heads that share a kv head.


def _chunks(q, kv_pages, page_table, kv_lens, query_starts, counts, sinks, out, *, scale, window, softcap, tuned, interpret):
    tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    sequences, group = page_table.shape[0], num_heads // num_kv_heads
    work = Work.of("chunks", q, kv_pages)
    blocks = fewer_rows(gpu_blocks(work, tuned), work, tokens)
    size = blocks.rows // group  # tokens of an item
    n = jnp.arange(sequences)
    number = query_starts[1:] - query_starts[:-1]
    most = -(-tokens // size) + sequences
    owner, place, total = expand(jnp.where((n >= counts[0]) & (n < counts[1]), -(-number // size), 0), most)
    most_keys = page_table.shape[1] * page_size
    seen = most_keys if window is None else min(most_keys, window + size - 1)
    read = 2 * -(-tokens // size) * seen * num_kv_heads * head_dim * kv_pages.dtype.itemsize
    with_sinks = sinks is not None
    return _call(
        partial(_chunk_kernel, blocks=blocks, with_sinks=with_sinks, scale=scale, window=window, softcap=softcap),
        grid=(most, num_kv_heads),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        aliases={8 + with_sinks: 0},
        cost=_cost(tokens * seen * num_heads, head_dim, read + 2 * q.size * q.dtype.itemsize),
        blocks=blocks,
        interpret=interpret,
        name="paged_attention_chunks",
    )(owner, place, total, kv_lens, query_starts, page_table, q, kv_pages, *([sinks.astype(jnp.float32)] if with_sinks else []), out)


def _chunk_kernel(
    owner, place, items, kv_lens, query_starts, table, q, pages, *rest, blocks, with_sinks, scale, window, softcap
):  # fmt: skip
    *sinks, _, o = rest
    i, h = pl.program_id(0), pl.program_id(1)
    tokens, num_heads, head_dim = q.shape
    group, width = num_heads // pages.shape[2], pl.next_power_of_2(head_dim)
    size = blocks.rows // group
    n, alive = owner[i], i < items[0]
    begin, end = query_starts[n], query_starts[n + 1]
    shift = kv_lens[n] - end  # from a row's number to its position
    start = begin + place[i] * size
    row, lane = lax.iota(jnp.int32, blocks.rows), _lanes(blocks.rows, width)
    token = start + lax.div(row, group)
    mine = (row < size * group) & (token < end) & alive
    head = h * group + lax.rem(row, group)
    positions = jnp.where(mine, token + shift, -1)
    low = 0 if window is None else jnp.maximum(start + shift - window + 1, 0)
    high = jnp.where(alive, jnp.minimum(start + size, end) + shift, 0)
    mask = _column(mine, width) & (lane < head_dim)
    place_of = jnp.where(mine, token, tokens)
    index = _column(place_of, width), _column(head, width), lane
    queries = plgpu.load(q.at[index], mask=mask, other=0.0)
    top, total = jnp.full(blocks.rows, _MASKED), jnp.zeros(blocks.rows)
    if with_sinks:
        top, total = plgpu.load(sinks[0].at[head]) * _LOG2_E, jnp.ones(blocks.rows)
    _, total, out = _attend(
        queries, positions, pages, table, n, h, jnp.asarray(low, jnp.int32), high, top, total, jnp.zeros((blocks.rows, width)),
        keys=blocks.keys, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    result = out / _column(jnp.where(total == 0, 1.0, total), width)
    plgpu.store(o.at[index], result.astype(o.dtype), mask=mask)


def _column(x, width: int):
    """[R] as [R, width]."""
    return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def _row(x, height: int):
    """[W] as [height, W]."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), (1,))


def _lanes(rows: int, width: int):
    return lax.broadcasted_iota(jnp.int32, (rows, width), 1)


def _cost(pairs: int, head_dim: int, bytes_accessed: int) -> pl.CostEstimate:
    """Of so many pairs of a query head's row and a key: all that the shapes have room for."""
    return pl.CostEstimate(flops=4 * pairs * head_dim, transcendentals=pairs, bytes_accessed=bytes_accessed)


def _call(kernel, *, grid, out_shape, cost, blocks, interpret, name, aliases=None):
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        cost_estimate=cost,
        # The Triton lowering drops the estimate; what is said here stays in the program's text, where planning reads it.
        metadata={"flops": str(cost.flops), "bytes_accessed": str(cost.bytes_accessed)},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=name,
    )
