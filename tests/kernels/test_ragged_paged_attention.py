"""Every implementation of the op against the plain one, on ragged batches that hypothesis draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import api, best_implementation, page_width, ragged_paged_attention, unsupported
from pallas_kernels.ragged_paged_attention.reference import ragged_paged_attention_reference
from pallas_kernels.ragged_paged_attention.stored import as_stored

attention = partial(jax.jit, static_argnames=("scale", "window", "softcap"))(ragged_paged_attention)

TOKENS, SEQUENCES, COLUMNS, PAGES = 96, 12, 24, 200


@st.composite
def batches(draw, page_size):
    """Lengths and places of a mixed batch: some decodes, then chunks, then padding."""
    capacity = COLUMNS * page_size
    num_decode = draw(st.integers(0, 10))
    chunks = draw(st.lists(st.integers(1, 30), max_size=2))
    counts = [1] * num_decode + chunks
    past = [draw(st.integers(0, capacity - n)) for n in counts]
    return num_decode, counts, past, draw(st.integers(0, 2**31 - 1))


def make_batch(batch, page_size, heads, kv_heads, head_dim, dtype=np.float32):
    num_decode, counts, past, seed = batch
    rng = np.random.default_rng(seed)
    n = len(counts)
    starts = np.full(SEQUENCES + 1, sum(counts), np.int32)
    starts[: n + 1] = np.cumsum([0, *counts])
    kv_lens = np.zeros(SEQUENCES, np.int32)
    kv_lens[:n] = np.add(past, counts)
    ids = rng.permutation(PAGES - 1) + 1  # page 0 is what padding points at
    table, used = np.zeros((SEQUENCES, COLUMNS), np.int32), 0
    for i in range(n):
        need = -(-int(kv_lens[i]) // page_size)
        table[i, :need] = ids[used : used + need]
        used += need
    q = rng.normal(size=(TOKENS, heads, head_dim)).astype(dtype)
    k, v = (rng.normal(size=(TOKENS, kv_heads, head_dim)).astype(dtype) for _ in range(2))
    pages = rng.normal(size=(PAGES, 2, kv_heads, page_size, head_dim)).astype(dtype)
    valid = np.zeros((PAGES, page_size), bool)  # poison all that no sequence has written
    for i in range(n):
        for p in range(past[i]):
            valid[table[i, p // page_size], p % page_size] = True
    pages = np.where(valid[:, None, None, :, None], pages, np.nan).astype(dtype)
    return q, k, v, pages, table, kv_lens, starts, np.array([num_decode, n], np.int32)


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 2, 16), (9, 3, 8), (4, 1, 32), (2, 2, 80)])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"window": 5, "softcap": 3.0, "sinks": True}])
@settings(max_examples=8, deadline=None)
@given(batch=batches(8))
def test_matches_reference(heads, kv_heads, head_dim, options, batch):
    arrays = make_batch(batch, 8, heads, kv_heads, head_dim)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = np.linspace(-1, 2, heads).astype(np.float32)
    expected, expected_pages = ragged_paged_attention_reference(*arrays, scale=0.3, **options)
    out, pages = attention(*map(jnp.asarray, arrays), scale=0.3, **options)
    total = arrays[6][-1]
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:total], expected[:total], atol=1e-5)
    np.testing.assert_array_equal(pages, expected_pages)


def test_a_row_is_bitwise_the_same_whoever_shares_the_batch():
    arrays = make_batch((6, [1] * 6 + [30], [5, 100, 37, 150, 8, 64, 50], 3), 8, 4, 2, 16)
    arrays = [np.nan_to_num(a) if a.dtype == np.float32 else a for a in arrays]
    together, _ = attention(*map(jnp.asarray, arrays), scale=0.3)
    q, k, v, pages, table, kv_lens, _, _ = arrays
    for i in range(6):
        first = [np.roll(x, -i, axis=0) for x in (q, k, v)]
        starts, counts = np.array([0] + [1] * SEQUENCES, np.int32), np.array([1, 1], np.int32)
        alone, _ = attention(*first, pages, np.roll(table, -i, axis=0), np.roll(kv_lens, -i), starts, counts, scale=0.3)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": np.zeros((TOKENS, 3, 16), np.float32)}, "do not agree"),
        ({"kv_pages": np.zeros((PAGES, 2, 2, 8, 8), np.float32)}, "kv_pages"),
        ({"kv_lens": np.zeros(3, np.int32)}, "do not agree"),
        ({"page_table": np.zeros((SEQUENCES, COLUMNS), np.int16)}, "must be int32"),
        ({"window": 0}, "window"),
        ({"sinks": np.zeros(2, np.float32)}, r"sinks \(2,\) must be \[4\]"),
        ({"kv_scales": np.zeros(2, np.float32)}, r"kv_scales \(2,\) must be \[2, 2\]"),
        ({"kv_pages": np.zeros((PAGES, 2, 2, 8, 16), np.int8)}, "int8 need kv_scales"),
        ({"implementation": "cuda"}, "is none of xla, tpu, gpu"),
        ({"implementation": "tpu"}, "pages are 16 wide, which is not a multiple of a TPU's 128 lanes: make them 128 wide"),
    ],
)
def test_bad_arguments(change, message):
    names = ("q", "k", "v", "kv_pages", "page_table", "kv_lens", "query_starts", "counts")
    arrays = dict(zip(names, make_batch((1, [1], [5], 0), 8, 4, 2, 16), strict=True))
    arguments = {**arrays, "scale": 1.0, **change}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        ragged_paged_attention(**{k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()})


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_pages_wider_than_heads(implementation, monkeypatch):
    q, k, v, pages, *rest = make_batch((4, [1] * 4 + [20], [5, 60, 37, 0, 13], 0), 16, 4, 2, 80)
    wide = np.pad(pages, ((0, 0),) * 4 + ((0, page_width("tpu", 80) - 80),))
    if implementation != "xla":
        interpreted = partial(api._function(implementation), interpret=True)
        monkeypatch.setattr(api, "_function", lambda _: interpreted)
    expected, expected_pages = ragged_paged_attention_reference(q, k, v, pages, *rest, scale=0.3)
    run = jax.jit(partial(ragged_paged_attention, scale=0.3, implementation=implementation))
    out, wide = run(*map(jnp.asarray, (q, k, v, wide, *rest)))
    assert out.shape == q.shape
    np.testing.assert_allclose(out[:24], expected[:24], atol=1e-5)
    np.testing.assert_array_equal(wide[..., :80], expected_pages)
    assert not np.any(wide[..., 80:])


@pytest.mark.parametrize(
    "platform,page_size,width,dtype,capability,expected",
    [
        ("cpu", 8, 64, "float32", None, "xla"),
        ("tpu", 16, 128, "bfloat16", None, "tpu"),
        ("tpu", 8, 128, "bfloat16", None, "page_size 8 is not a multiple of 16"),
        ("tpu", 16, 64, "bfloat16", None, "64 wide"),
        ("gpu", 8, 80, "bfloat16", "8.0", "gpu"),
        ("rocm", 16, 64, "float32", "gfx942", "gpu"),
        ("cuda", 16, 64, "float32", None, "gpu"),
        ("gpu", 16, 64, "bfloat16", "7.5", "8.0 and later, not 7.5"),
        ("gpu", 16, 512, "bfloat16", "9.0", "256 is the most"),
        ("gpu", 16, 64, "float8_e4m3fn", "8.0", "8.9 and later, not 8.0"),
        ("tpu", 16, 128, "int8", None, "page_size 16 is not a multiple of 32"),
        ("gpu", 16, 64, "int16", "9.0", "not int16"),
    ],
)
def test_the_best_implementation(platform, page_size, width, dtype, capability, expected):
    best = best_implementation(platform, page_size, width, dtype, capability)
    if expected in ("xla", "tpu", "gpu"):
        assert best == expected and unsupported(best, page_size, width, dtype, capability) is None
    else:
        assert best == "xla" and expected in unsupported(platform, page_size, width, dtype, capability)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_pages_of_a_byte(implementation, dtype, monkeypatch):
    """The very bytes of the reference are written, and read as it reads them; what is too large becomes the largest there is."""
    q, k, v, pages, *rest = make_batch((4, [1] * 4 + [20], [5, 60, 37, 0, 13], 0), 32, 4, 2, 128)
    k[3] *= 1000
    scales = np.array([[0.02, 0.05], [0.03, 0.04]], np.float32)
    pages = np.nan_to_num(pages / scales.T[0][:, None, None]).clip(-100, 100).astype(dtype)
    if implementation != "xla":
        interpreted = partial(api._function(implementation), interpret=True)
        monkeypatch.setattr(api, "_function", lambda _: interpreted)
    expected, expected_pages = ragged_paged_attention_reference(q, k, v, pages, *rest, scale=0.1, kv_scales=scales, softcap=20.0)
    run = jax.jit(partial(ragged_paged_attention, scale=0.1, softcap=20.0, implementation=implementation))
    out, pages = run(*map(jnp.asarray, (q, k, v, pages, *rest)), kv_scales=jnp.asarray(scales))
    assert pages.dtype == dtype
    np.testing.assert_array_equal(np.asarray(pages, np.float32), expected_pages.astype(np.float32))
    np.testing.assert_allclose(out[:24], expected[:24], atol=2e-5)


def test_how_near_pages_of_a_byte_are():
    arrays = make_batch((6, [1] * 6 + [30], [5, 100, 37, 150, 8, 64, 50], 3), 8, 4, 2, 64)
    q, k, v, pages, *rest = (np.nan_to_num(a) for a in arrays)
    expected, _ = ragged_paged_attention_reference(q, k, v, pages, *rest, scale=0.125)
    for dtype, scale, near in ((jnp.float8_e4m3fn, None, 0.15), (jnp.int8, 5 / 127, 0.04)):
        scales = None if scale is None else jnp.full((2, 2), scale)
        stored = as_stored(jnp.asarray(pages) / (scale or 1), dtype)
        out, _ = attention(q, k, v, stored, *rest, scale=0.125, kv_scales=scales)
        assert np.abs(out[:36] - expected[:36]).max() < near
