"""The op: checks, and the choice of an implementation."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tuning import LANES, tile_rows

if TYPE_CHECKING:
    from pallas_kernels.ragged_paged_attention.tables import Table

Implementation = Literal["xla", "tpu", "gpu"]


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    decode_only: bool = False,
    implementation: Implementation | None = None,
    tuned: Table | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes new keys and values into their pages, and attends causally; PagedAttention (Kwon et al., arXiv 2309.06180).

    Tokens of all sequences lie one after the other. Sequence n has the tokens query_starts[n] to query_starts[n + 1], which
    are its last ones: they stand at positions kv_lens[n] - count to kv_lens[n] - 1. Everything is written before anything is
    read: with a shared prefix, a sequence reads pages that another one writes in the same call.

    Args:
      q: [T, Hq, D], queries.
      k, v: [T, Hk, D], the new keys and values; Hq is a multiple of Hk.
      kv_pages: [pages, 2, Hk, page_size, W], keys at 0 and values at 1. Donate it: it is updated in place. W is D, or more (see
        `page_width`), with zeros past D.
      page_table: int32 [N, P], the pages of each sequence in order; entries past its length may be any valid page.
      kv_lens: int32 [N], tokens in each sequence, the new ones included.
      query_starts: int32 [N + 1].
      counts: int32 [2], (d, n): sequences 0 to d - 1 have one new token each, d to n - 1 any number; the rest are padding.
      scale: what scores are multiplied by.
      window: how many positions a query sees, its own included; None: all.
      softcap: scores become softcap * tanh(score / softcap).
      sinks: [Hq], a logit for each head that takes part in the softmax and has no value (attention sinks).
      kv_scales: float32 [2, Hk], what the keys and values that pages hold are to be multiplied by, for each head. Pages may be
        float8_e4m3fn or int8: what is written is divided by its scale and, if out of range, becomes the largest there is.
      decode_only: no sequence has more than one new token (counts[0] == counts[1]): the program is half the size.
      implementation: None picks one by JAX's default platform and what it can do: `xla` runs everywhere, `tpu` are Mosaic kernels,
        `gpu` are Triton kernels.
      tuned: sizes of blocks that were measured on the device (`tables.read_table`); what it does not have, a heuristic says. Other
        sizes add up in another order.

    Returns:
      (out [T, Hq, D], kv_pages). Rows of `out` past the last token are unspecified but finite.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape != (tokens, num_kv_heads, head_dim) or v.shape != k.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not agree: [T, Hq, D], [T, Hk, D], [T, Hk, D] are needed")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    if kv_pages.ndim != 5 or kv_pages.shape[1:3] != (2, num_kv_heads) or kv_pages.shape[4] < head_dim:
        raise ValueError(f"kv_pages {kv_pages.shape} must be [pages, 2, {num_kv_heads}, page_size, {head_dim} or more]")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks {sinks.shape} must be [{num_heads}]: a logit for each query head")
    sequences = page_table.shape[0]
    if page_table.ndim != 2 or kv_lens.shape != (sequences,) or query_starts.shape != (sequences + 1,) or counts.shape != (2,):
        raise ValueError(
            f"page_table {page_table.shape}, kv_lens {kv_lens.shape}, query_starts {query_starts.shape} and counts {counts.shape} "
            "do not agree: [N, P], [N], [N + 1] and [2] are needed"
        )
    for name, array in (("page_table", page_table), ("kv_lens", kv_lens), ("query_starts", query_starts), ("counts", counts)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, not {array.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if kv_scales is None and kv_pages.dtype == jnp.int8:
        raise ValueError("pages of int8 need kv_scales: without them keys and values would be rounded to whole numbers")
    if kv_scales is not None and kv_scales.shape != (2, num_kv_heads):
        raise ValueError(f"kv_scales {kv_scales.shape} must be [2, {num_kv_heads}]")
    if implementation is None:
        implementation = best_implementation(jax.default_backend(), *kv_pages.shape[3:], kv_pages.dtype)
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} is none of {', '.join(get_args(Implementation))}")
    if reason := unsupported(implementation, *kv_pages.shape[3:], kv_pages.dtype):
        raise NotImplementedError(f"implementation={implementation!r} of ragged_paged_attention: {reason}; 'xla' runs everywhere")
    if pad := kv_pages.shape[4] - head_dim:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    if kv_scales is not None:  # a scale of keys may as well be one of queries, and one of values one of results
        of_heads = jnp.repeat(kv_scales, num_heads // num_kv_heads, axis=1)[..., None]
        k, v = (x.astype(jnp.float32) / s[:, None] for x, s in zip((k, v), kv_scales, strict=True))
        q = (q.astype(jnp.float32) * of_heads[0]).astype(q.dtype)
    options = dict(scale=scale, window=window, softcap=softcap, sinks=sinks, decode_only=decode_only)
    if implementation != "xla":  # it has no blocks
        options["tuned"] = tuned
    out, kv_pages = _function(implementation)(q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, **options)
    out = out[..., :head_dim]
    if kv_scales is not None:
        out = (out.astype(jnp.float32) * of_heads[1]).astype(out.dtype)
    return out, kv_pages


@cache
def _function(implementation: Implementation):
    """Only what is used is imported: each brings a compiler's dialect with it."""
    if implementation == "tpu":
        from pallas_kernels.ragged_paged_attention.tpu import ragged_paged_attention_tpu as function
    elif implementation == "gpu":
        from pallas_kernels.ragged_paged_attention.gpu import ragged_paged_attention_gpu as function
    else:
        from pallas_kernels.ragged_paged_attention.xla import ragged_paged_attention_xla as function
    return function


def page_width(platform: str, head_dim: int) -> int:
    """What the last axis of `kv_pages` should be: on TPUs whole lanes, for memory is laid out in them (a narrower array is copied
    into such a one and back at each call); elsewhere head_dim."""
    return -(-head_dim // LANES) * LANES if platform == "tpu" else head_dim


def unsupported(implementation: Implementation, page_size: int, width: int, kv_dtype, compute_capability: str | None = None) -> str | None:
    """Why an implementation cannot work with pages [pages, 2, Hk, page_size, width] of a type; None if it can.

    compute_capability: of the GPU, where it is known: "9.0" of NVIDIA's, "gfx942" of AMD's.
    """
    kv_dtype = jnp.dtype(kv_dtype)
    if implementation == "tpu":
        if page_size % (rows := tile_rows(kv_dtype)):
            return f"page_size {page_size} is not a multiple of {rows}, as TPU tiles of {kv_dtype} need"
        if width % LANES:
            return f"pages are {width} wide, which is not a multiple of a TPU's {LANES} lanes: make them {page_width('tpu', width)} wide"
    if implementation == "gpu":
        if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
            return f"jax {jax.__version__} has no Triton lowering of Pallas"
        if kv_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
            return f"the GPU kernels have pages of float32, bfloat16, float16, int8 and float8_e4m3fn, not {kv_dtype}"
        if width > 256:
            return f"a head of {width} does not fit a GPU's registers beside its sums: 256 is the most"
        if compute_capability is not None and not compute_capability.startswith("gfx") and float(compute_capability) < 8:
            return f"the GPU kernels are for compute capability 8.0 and later, not {compute_capability}"
        if kv_dtype == jnp.float8_e4m3fn and compute_capability is not None:
            if compute_capability.startswith("gfx") or float(compute_capability) < 8.9:
                return f"Triton has float8_e4m3fn for compute capability 8.9 and later, not {compute_capability}"
    return None


def best_implementation(platform: str, page_size: int, width: int, kv_dtype, compute_capability: str | None = None) -> Implementation:
    """The quickest that can do it on a platform, with pages as `unsupported` describes them."""
    native = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}.get(platform, "xla")
    return "xla" if unsupported(native, page_size, width, kv_dtype, compute_capability) else native
