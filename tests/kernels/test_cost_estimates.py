"""What the TPU kernels say that they move, against what they move: every copy and block counted in JAX's TPU interpreter."""

from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # what chips run is not compiled here: this is the interpreter

SEQUENCES, COLUMNS, PAGE_SIZE = 16, 8, 16
KEYS = COLUMNS * PAGE_SIZE


@pytest.fixture
def moved(monkeypatch):
    """Fills in: bytes that kernels have moved to and from HBM, and that they said they would."""
    count = {"counted": 0, "said": 0}
    get, store, write, call = interpreter.get, interpreter.store, interpreter.DMA.execute_write, tpu.pl.pallas_call

    @wraps(get)  # the interpreter also takes what `get` wraps
    def counted_get(*args, input_name=None, **options):
        token, value = get(*args, input_name=input_name, **options)
        count["counted"] += np.asarray(value).nbytes if input_name is not None else 0  # a block of an input
        return token, value

    @wraps(store)
    def counted_store(token, device, core, space, buffer, transforms, value, *args, output_name=None, **options):
        count["counted"] += np.asarray(value).nbytes if output_name is not None else 0  # a block of an output
        return store(token, device, core, space, buffer, transforms, value, *args, output_name=output_name, **options)

    def counted_write(dma):
        count["counted"] += dma.data_size if dma.data is not None else 0
        write(dma)

    def said(kernel, **options):
        count["said"] += options["cost_estimate"].bytes_accessed
        return call(kernel, **options)

    counted_get.__wrapped__, counted_store.__wrapped__ = get.__wrapped__, store.__wrapped__
    monkeypatch.setattr(interpreter, "get", counted_get)
    monkeypatch.setattr(interpreter, "store", counted_store)
    monkeypatch.setattr(interpreter.DMA, "execute_write", counted_write)
    monkeypatch.setattr(tpu.pl, "pallas_call", said)
    return count


def arrays(tokens, heads, kv_heads, dtype):
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    pages = new(SEQUENCES * COLUMNS, 2, kv_heads, PAGE_SIZE, 128)
    table = jnp.arange(SEQUENCES * COLUMNS, dtype=jnp.int32).reshape(SEQUENCES, COLUMNS)
    return new(tokens, heads, 128), new(tokens, kv_heads, 128), new(tokens, kv_heads, 128), pages, table


def run(function, moved):
    jax.block_until_ready(jax.jit(function)())
    assert moved["said"] > 0
    assert moved["counted"] == pytest.approx(moved["said"], rel=0.05)


INTERPRET = pltpu.InterpretParams()
OPTIONS = dict(scale=0.1, softcap=None, interpret=INTERPRET)
int32 = lambda *numbers: jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("window", [None, 40])
def test_decode(moved, dtype, window):
    q, _, _, pages, table = arrays(SEQUENCES, 8, 2, dtype)
    full = np.full(SEQUENCES, KEYS) if window is None else KEYS - np.arange(SEQUENCES)  # a window's pages depend on where it ends
    sinks = jnp.zeros((8, 128))
    lengths, counts = jnp.asarray(full, jnp.int32), int32(SEQUENCES, SEQUENCES)
    run(lambda: tpu._decode(q, pages, table, lengths, counts, sinks, window=window, **OPTIONS), moved)


@pytest.mark.parametrize("window", [None, 40])
def test_chunks(moved, window):
    q, _, _, pages, table = arrays(256, 4, 2, jnp.bfloat16)
    table = jnp.pad(table, ((0, 0), (0, 24)))  # keys enough for chunks of 128 after 384 others
    lengths, starts = int32(512, 512, *[0] * (SEQUENCES - 2)), int32(0, 128, *[256] * (SEQUENCES - 1))
    run(lambda: tpu._chunks(q, pages, table, lengths, starts, int32(0, 2), jnp.zeros((4, 128)), window=window, **OPTIONS), moved)


def test_writing_a_token_a_sequence(moved):
    _, k, v, pages, table = arrays(SEQUENCES, 4, 2, jnp.bfloat16)
    lengths, starts = jnp.full(SEQUENCES, 77, jnp.int32), jnp.arange(SEQUENCES + 1, dtype=jnp.int32)
    counts = int32(SEQUENCES, SEQUENCES)
    run(lambda: tpu._write(k, v, pages, table, lengths, starts, counts, decode_only=True, interpret=INTERPRET), moved)


def test_writing_chunks(moved):
    _, k, v, pages, table = arrays(SEQUENCES * 32, 4, 2, jnp.bfloat16)
    lengths, starts = jnp.full(SEQUENCES, 40, jnp.int32), 32 * jnp.arange(SEQUENCES + 1, dtype=jnp.int32)  # from the middle of a tile
    counts = int32(0, SEQUENCES)
    run(lambda: tpu._write(k, v, pages, table, lengths, starts, counts, decode_only=False, interpret=INTERPRET), moved)
