"""What the GPU kernels say that they move, against the numbers that their loads and stores are not masked from, counted in Pallas's
interpreter. (What a GPU's caches spare of it, neither side knows.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import gpu

SEQUENCES, COLUMNS, PAGE_SIZE = 4, 64, 16
KEYS = COLUMNS * PAGE_SIZE


@pytest.fixture
def moved(monkeypatch):
    """Fills in: bytes of the loads and stores that were done, and those that the kernels said they would."""
    count = {"counted": 0, "said": 0}
    load, store, call = gpu.plgpu.load, gpu.plgpu.store, gpu.pl.pallas_call

    def add(number):
        count["counted"] += int(number)

    def counted(array, mask):
        numbers = jnp.int32(array.size) if mask is None else jnp.sum(jnp.broadcast_to(mask, array.shape), dtype=jnp.int32)
        jax.debug.callback(add, numbers * array.dtype.itemsize)

    def counted_load(ref, *, mask=None, **options):
        value = load(ref, mask=mask, **options)
        counted(value, mask)
        return value

    def counted_store(ref, value, *, mask=None, **options):
        counted(value, mask)
        store(ref, value, mask=mask, **options)

    def said(kernel, **options):
        count["said"] += options["cost_estimate"].bytes_accessed
        assert options["metadata"]["bytes_accessed"] == str(options["cost_estimate"].bytes_accessed)
        return call(kernel, **options)

    monkeypatch.setattr(gpu.plgpu, "load", counted_load)
    monkeypatch.setattr(gpu.plgpu, "store", counted_store)
    monkeypatch.setattr(gpu.pl, "pallas_call", said)
    return count


def arrays(tokens, heads, kv_heads, dtype):
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    pages = new(SEQUENCES * COLUMNS, 2, kv_heads, PAGE_SIZE, 128)
    table = jnp.arange(SEQUENCES * COLUMNS, dtype=jnp.int32).reshape(SEQUENCES, COLUMNS)
    return new(tokens, heads, 128), new(tokens, kv_heads, 128), new(tokens, kv_heads, 128), pages, table


def run(function, moved):
    jax.block_until_ready(jax.jit(function)())
    jax.effects_barrier()
    assert moved["said"] > 0
    assert moved["counted"] == pytest.approx(moved["said"], rel=0.05)


OPTIONS = dict(scale=0.1, softcap=None, tuned=None, interpret=True)
int32 = lambda *numbers: jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("window", [None, 300])
def test_decode(moved, dtype, window):
    q, _, _, pages, table = arrays(SEQUENCES, 8, 2, dtype)
    lengths, counts = jnp.full(SEQUENCES, KEYS, jnp.int32), int32(SEQUENCES, SEQUENCES)
    run(lambda: gpu._decode(q, pages, table, lengths, counts, None, jnp.zeros_like(q), window=window, **OPTIONS), moved)


@pytest.mark.parametrize("window", [None, 300])
def test_chunks(moved, window):
    q, _, _, pages, table = arrays(128, 4, 2, jnp.bfloat16)
    lengths, starts = int32(KEYS, KEYS, 0, 0), int32(0, 64, 128, 128, 128)  # whole blocks: 128 rows of two heads each
    run(lambda: gpu._chunks(q, pages, table, lengths, starts, int32(0, 2), None, jnp.zeros_like(q), window=window, **OPTIONS), moved)


def test_writing(moved):
    _, k, v, pages, table = arrays(SEQUENCES * 32, 4, 2, jnp.bfloat16)
    lengths, starts = jnp.full(SEQUENCES, 40, jnp.int32), 32 * jnp.arange(SEQUENCES + 1, dtype=jnp.int32)
    run(lambda: gpu._write(k, v, pages, table, lengths, starts, int32(0, SEQUENCES), True), moved)
