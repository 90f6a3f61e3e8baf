"""Attention of ragged queries over a paged key/value cache, for any mix of decode, chunked prefill and prefill."""

from pallas_kernels.ragged_paged_attention.api import best_implementation, page_width, ragged_paged_attention, unsupported

__all__ = ["best_implementation", "page_width", "ragged_paged_attention", "unsupported"]
