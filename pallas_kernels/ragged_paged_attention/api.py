"""The op: checks, and the choice of an implementation."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tpu import ragged_paged_attention_tpu, tile_rows
from pallas_kernels.ragged_paged_attention.xla import ragged_paged_attention_xla

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
    decode_only: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes new keys and values into their pages, and attends causally; PagedAttention (Kwon et al., arXiv 2309.06180).

    Tokens of all sequences lie one after the other. Sequence n has the tokens query_starts[n] to query_starts[n + 1], which
    are its last ones: they stand at positions kv_lens[n] - count to kv_lens[n] - 1. Everything is written before anything is
    read: with a shared prefix, a sequence reads pages that another one writes in the same call.

    Args:
      q: [T, Hq, D], queries.
      k, v: [T, Hk, D], the new keys and values; Hq is a multiple of Hk.
      kv_pages: [pages, 2, Hk, page_size, D], keys at 0 and values at 1. Donate it: it is updated in place.
      page_table: int32 [N, P], the pages of each sequence in order; entries past its length may be any valid page.
      kv_lens: int32 [N], tokens in each sequence, the new ones included.
      query_starts: int32 [N + 1].
      counts: int32 [2], (d, n): sequences 0 to d - 1 have one new token each, d to n - 1 any number; the rest are padding.
      scale: what scores are multiplied by.
      window: how many positions a query sees, its own included; None: all.
      softcap: scores become softcap * tanh(score / softcap).
      sinks: [Hq], a logit for each head that takes part in the softmax and has no value (attention sinks).
      decode_only: no sequence has more than one new token (counts[0] == counts[1]): the program is half the size.
      implementation: None picks one by JAX's default platform and what it can do: `xla` runs everywhere, `tpu` are Mosaic kernels.

    Returns:
      (out [T, Hq, D], kv_pages). Rows of `out` past the last token are unspecified but finite.
    """
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape != (tokens, num_kv_heads, head_dim) or v.shape != k.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not agree: [T, Hq, D], [T, Hk, D], [T, Hk, D] are needed")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    if kv_pages.ndim != 5 or kv_pages.shape[1:3] != (2, num_kv_heads) or kv_pages.shape[4] != head_dim:
        raise ValueError(f"kv_pages {kv_pages.shape} must be [pages, 2, {num_kv_heads}, page_size, {head_dim}]")
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
    if implementation is None:
        implementation = best_implementation(jax.default_backend(), kv_pages.shape[3], head_dim, kv_pages.dtype)
    if implementation not in _IMPLEMENTATIONS:
        raise NotImplementedError(
            f"implementation={implementation!r} of ragged_paged_attention is not written; there are {', '.join(_IMPLEMENTATIONS)}, "
            "and 'xla' runs on every platform"
        )
    options = dict(scale=scale, window=window, softcap=softcap, sinks=sinks, decode_only=decode_only)
    return _IMPLEMENTATIONS[implementation](q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, **options)


_IMPLEMENTATIONS = {"xla": ragged_paged_attention_xla, "tpu": ragged_paged_attention_tpu}


def best_implementation(platform: str, page_size: int, head_dim: int, kv_dtype) -> Implementation:
    """The quickest that can do it on a platform."""
    if platform == "tpu" and page_size % tile_rows(kv_dtype) == 0 and head_dim % 128 == 0:
        return "tpu"
    return "xla"
