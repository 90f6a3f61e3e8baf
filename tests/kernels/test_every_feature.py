"""Every value of every feature of the op, in the GPU's and the TPU's kernels, each in its own interpreter: a few cases in which each
value comes once, and (slow) whatever hypothesis puts together. The TPU's interpreter searches for races; what no sequence has
written is NaN, in pages of int8 the largest there is."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_tpu_kernels
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from test_ragged_paged_attention import batches, make_batch

from jaxllm.planning.kernels import DTYPES, HEAD_DIMS, KV_DTYPES, PAGE_SIZES, KernelCase
from pallas_kernels.ragged_paged_attention import api, page_width, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.reference import ragged_paged_attention_reference

GROUPS = ((4, 4), (9, 3), (8, 1), (16, 1), (4, 2))
WINDOWS, SOFTCAPS = (None, 1, 5, 100), (None, 3.0)
CASES = [
    KernelCase(head_dim=64, heads=4, kv_heads=4, page_size=32, dtype="float32", window=1),
    KernelCase(head_dim=80, heads=9, kv_heads=3, page_size=64, sinks=True),
    KernelCase(head_dim=96, heads=8, kv_heads=1, page_size=128, dtype="float32", softcap=3.0),
    KernelCase(head_dim=128, heads=4, kv_heads=2, page_size=256, kv_dtype="float8_e4m3fn", window=100, softcap=3.0, sinks=True),
    KernelCase(head_dim=256, heads=4, kv_heads=2, page_size=32, dtype="float32", kv_dtype="int8", window=5),
    KernelCase(head_dim=64, heads=16, kv_heads=1, page_size=16),
]
alike = pytest.mark.parametrize("implementation", ["gpu", "tpu"])
NOTHING = (0, [], [], 0)
WHOLE_PAGES = (2, [1, 1, 16, 30], [15, 255, 240, 0], 0)  # that a sequence ends with, or begins after


@cache
def op(implementation: str, case: KernelCase):
    options = dict(scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, implementation=implementation)
    return jax.jit(partial(ragged_paged_attention, **options))


def check(implementation: str, case: KernelCase, batch) -> None:
    dtype, kv_dtype = (np.dtype(getattr(ml_dtypes, t, t)) for t in (case.dtype, case.kv_dtype or case.dtype))
    q, k, v, pages, *rest = make_batch(batch, case.page_size, case.heads, case.kv_heads, case.head_dim)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    more = {"sinks": np.linspace(-1, 2, case.heads).astype(np.float32)} if case.sinks else {}
    if kv_dtype.itemsize == 1:
        # None of which makes a short number like 1.0 fall halfway between two of fp8: a division may round either way there.
        more["kv_scales"] = np.linspace(0.0213, 0.0517, 2 * case.kv_heads).astype(np.float32).reshape(2, -1)
        pages = pages / more["kv_scales"].T[0][:, None, None]
        pages = np.where(np.isnan(pages), 127 if kv_dtype == np.int8 else np.nan, np.clip(pages, -127, 127))
    pages = pages.astype(kv_dtype)
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    expected, _ = ragged_paged_attention_reference(
        *wide, pages if kv_dtype.itemsize == 1 else np.asarray(pages, np.float32), *rest,
        scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, **more,
    )  # fmt: skip
    _, expected_pages = ragged_paged_attention_reference(q, k, v, pages, *rest, scale=1.0, **more)
    width = page_width(implementation, case.head_dim)
    placed = np.pad(pages, ((0, 0),) * 4 + ((0, width - case.head_dim),))
    with pytest.MonkeyPatch.context() as patch:
        interpret = test_tpu_kernels.INTERPRET if implementation == "tpu" else True
        interpreted = partial(api._function(implementation), interpret=interpret)
        patch.setattr(api, "_function", lambda _: interpreted)
        out, found = op(implementation, case)(*map(jnp.asarray, (q, k, v, placed, *rest)), **more)
    out, total = np.asarray(out, np.float32), rest[2][rest[3][1]]
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:total], expected[:total], atol=1e-5 if dtype == np.float32 else 2e-2)
    np.testing.assert_array_equal(np.asarray(found, np.float32)[..., : case.head_dim], expected_pages.astype(np.float32))


@alike
@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=2, deadline=None)
@example(batch=NOTHING)
@example(batch=WHOLE_PAGES)
@given(batch=batches(16))
def test_matches_reference(implementation, case, batch):
    check(implementation, case, batch)


def test_each_value_comes_once():
    has = lambda field: {getattr(case, field) for case in CASES}
    assert (has("head_dim"), has("dtype"), has("page_size")) == (set(HEAD_DIMS), set(DTYPES), set(PAGE_SIZES))
    assert has("kv_dtype") == {None, *KV_DTYPES} and has("window") == set(WINDOWS) and has("softcap") == set(SOFTCAPS)
    assert has("sinks") == {False, True} and {(case.heads, case.kv_heads) for case in CASES} == set(GROUPS)


@st.composite
def cases(draw):
    heads, kv_heads = draw(st.sampled_from(GROUPS))
    kv_dtype = draw(st.sampled_from((None, *KV_DTYPES)))
    sizes = [s for s in PAGE_SIZES if s >= 32 or kv_dtype is None]  # a tile of the TPU has 32 rows of bytes
    return KernelCase(
        head_dim=draw(st.sampled_from(HEAD_DIMS)), dtype=draw(st.sampled_from(DTYPES)), heads=heads, kv_heads=kv_heads,
        page_size=draw(st.sampled_from(sizes)), window=draw(st.sampled_from(WINDOWS)), softcap=draw(st.sampled_from(SOFTCAPS)),
        sinks=draw(st.booleans()), kv_dtype=kv_dtype,
    )  # fmt: skip


@pytest.mark.slow
@alike
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), batch=batches(16))
def test_whatever_is_put_together(implementation, case, batch):
    check(implementation, case, batch)


@alike
def test_each_device_attends_with_its_own_heads(implementation):
    """Under `shard_map`, as the engine does with tensor parallelism: the very bits of one device."""
    q, k, v, pages, *rest = make_batch((3, [1] * 3 + [20], [5, 60, 37, 13], 0), 16, 4, 2, 128)
    options = dict(scale=0.1, window=None, softcap=None, sinks=None, decode_only=False, interpret=True)
    attend = partial(api._function(implementation), **options)
    heads, of_pages, whole = PartitionSpec(None, "x"), PartitionSpec(None, None, "x"), PartitionSpec()
    specs = (heads, heads, heads, of_pages, whole, whole, whole, whole)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, of_pages), check_vma=False)
    arrays = list(map(jnp.asarray, (q, k, v, pages, *rest)))
    for found, expected in zip(jax.jit(split)(*arrays), jax.jit(attend)(*arrays), strict=True):
        np.testing.assert_array_equal(found, expected)
