"""Attention of ragged queries over a paged key/value cache, for any mix of decode, chunked prefill and prefill."""

from pallas_kernels.ragged_paged_attention.api import best_implementation, ragged_paged_attention

__all__ = ["best_implementation", "ragged_paged_attention"]
