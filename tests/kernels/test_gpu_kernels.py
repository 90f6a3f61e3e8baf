"""The GPU kernels in Pallas's interpreter, where outputs begin as NaN, against the plain implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_ragged_paged_attention import COLUMNS, batches, make_batch

from pallas_kernels.ragged_paged_attention.gpu import ragged_paged_attention_gpu
from pallas_kernels.ragged_paged_attention.reference import ragged_paged_attention_reference
from pallas_kernels.ragged_paged_attention.tuning import Work, decode_splits, gpu_blocks

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # what chips run is not compiled here: this is the interpreter

STATIC = ("scale", "window", "softcap", "decode_only", "interpret")
attention = jax.jit(partial(ragged_paged_attention_gpu, interpret=True), static_argnames=STATIC)
PLAIN = dict(window=None, softcap=None, sinks=None, decode_only=False)


def check(arrays, *, atol, **options):
    options = PLAIN | options
    if options["sinks"]:
        options["sinks"] = np.linspace(-1, 2, arrays[0].shape[1]).astype(np.float32)
    decode_only = options.pop("decode_only")
    wide = [np.asarray(a, np.float32) if a.dtype.kind not in "iu" else a for a in arrays]
    expected, expected_pages = ragged_paged_attention_reference(*wide, scale=0.3, **options)
    out, pages = attention(*map(jnp.asarray, arrays), scale=0.3, decode_only=decode_only, **options)
    total = arrays[6][arrays[7][1]]
    out = np.asarray(out, np.float32)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:total], expected[:total], atol=atol)
    np.testing.assert_array_equal(np.asarray(pages, np.float32), expected_pages)


@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,page_size,options",
    [
        (4, 2, 128, 16, {}),
        (9, 3, 64, 32, {"window": 20}),
        (4, 4, 80, 16, {"softcap": 2.0}),
        (7, 1, 96, 64, {"sinks": True}),
        (4, 1, 256, 16, {"window": 5, "softcap": 3.0, "sinks": True}),
    ],
    ids=str,
)
@settings(max_examples=4, deadline=None)
@given(batch=batches(16))
def test_matches_reference(heads, kv_heads, head_dim, page_size, options, batch):
    check(make_batch(batch, page_size, heads, kv_heads, head_dim), atol=1e-5, **options)


@pytest.mark.parametrize("options", [{}, {"window": 600}, {"window": 100, "sinks": True}], ids=str)
@settings(max_examples=2, deadline=None)
@given(batch=batches(128))
def test_keys_that_are_split(options, batch):
    assert decode_splits(COLUMNS * 128, gpu_blocks(Work("decode", 2, 1, 16, 128, "float32", "float32")))[0] == 6
    check(make_batch(batch, 128, 2, 1, 16), atol=1e-5, **options)


def test_the_largest_pages():
    check(make_batch((2, [1, 1, 40], [300, 0, 700], 1), 256, 4, 2, 64), atol=1e-5)


def test_fewer_tokens_than_there_is_room_for_sequences():
    q, k, v, *rest = make_batch((2, [1, 1], [30, 50], 0), 16, 4, 2, 64)
    check((q[:4], k[:4], v[:4], *rest), atol=1e-5, decode_only=True)


def test_a_row_is_bitwise_the_same_whoever_shares_the_batch():
    together = make_batch((6, [1] * 6 + [30], [5, 100, 37, 150, 8, 64, 50], 3), 16, 4, 2, 64)
    out, _ = attention(*map(jnp.asarray, together), scale=0.3, **PLAIN)
    q, k, v, pages, table, kv_lens, _, _ = together
    for i in range(6):
        alone = [np.roll(x, -i, axis=0) for x in (q, k, v)]
        starts, counts = np.array([0] + [1] * (len(kv_lens)), np.int32), np.array([1, 1], np.int32)
        mine, _ = attention(*alone, pages, np.roll(table, -i, axis=0), np.roll(kv_lens, -i), starts, counts, scale=0.3, **PLAIN)
        np.testing.assert_array_equal(mine[0], out[i])


def test_queries_of_another_type_than_the_pages():
    q, *rest = make_batch((1, [1], [5], 0), 16, 4, 2, 64)
    with pytest.raises(ValueError, match="queries of bfloat16 over pages of float32"):
        ragged_paged_attention_gpu(q.astype(jnp.bfloat16), *rest, scale=1.0, **PLAIN)
