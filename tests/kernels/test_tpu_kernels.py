"""The TPU kernels in JAX's TPU interpreter, copies and semaphores included, against the plain implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from test_ragged_paged_attention import batches, make_batch

from pallas_kernels.ragged_paged_attention.reference import ragged_paged_attention_reference
from pallas_kernels.ragged_paged_attention.tpu import ragged_paged_attention_tpu

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # what chips run is not compiled here: this is the interpreter

# What no copy has filled is NaN, and two copies of one place that may happen at once are an error.
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
STATIC = ("scale", "window", "softcap", "decode_only", "interpret")
attention = jax.jit(partial(ragged_paged_attention_tpu, interpret=INTERPRET), static_argnames=STATIC)
PLAIN = dict(window=None, softcap=None, sinks=None, decode_only=False)


def check(arrays, *, atol, **options):
    options = PLAIN | options
    wide = [np.asarray(a, np.float32) if a.dtype.kind not in "iu" else a for a in arrays]
    decode_only = options.pop("decode_only")
    expected, _ = ragged_paged_attention_reference(*wide, scale=0.3, **options)
    out, pages = attention(*map(jnp.asarray, arrays), scale=0.3, decode_only=decode_only, **options)
    total = arrays[6][arrays[7][1]]
    out = np.asarray(out, np.float32)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:total], expected[:total], atol=atol)
    _, expected_pages = ragged_paged_attention_reference(*arrays, scale=0.3, **options)
    np.testing.assert_array_equal(np.asarray(pages, np.float32), np.asarray(expected_pages, np.float32))


@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,options",
    [
        (4, 2, 128, {}),
        (9, 3, 64, {"window": 20}),
        (4, 4, 80, {"softcap": 2.0}),
        (4, 1, 256, {"window": 5, "softcap": 3.0, "sinks": True}),
    ],
    ids=str,
)
@settings(max_examples=3, deadline=None)
@given(batch=batches(16))
def test_matches_reference(heads, kv_heads, head_dim, options, batch):
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = np.linspace(-1, 2, heads).astype(np.float32)
    check(make_batch(batch, 16, heads, kv_heads, head_dim), atol=1e-5, **options)


def test_pages_that_tiles_do_not_divide():
    with pytest.raises(ValueError, match="page_size 8 is not a multiple of 16"):
        ragged_paged_attention_tpu(*make_batch((1, [1], [5], 0), 8, 4, 2, 128, jnp.bfloat16), scale=1.0, **PLAIN)
