"""Attention of ragged queries over a paged key/value cache, for any mix of decode, chunked prefill and prefill."""

from pallas_kernels.ragged_paged_attention.api import best_implementation, page_width, ragged_paged_attention, unsupported
from pallas_kernels.ragged_paged_attention.xla import loop_trips

__all__ = ["best_implementation", "loop_trips", "page_width", "ragged_paged_attention", "unsupported"]
