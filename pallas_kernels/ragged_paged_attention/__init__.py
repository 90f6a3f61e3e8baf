"""Attention of ragged queries over a paged key/value cache, for any mix of decode, chunked prefill and prefill."""

from pallas_kernels.ragged_paged_attention.api import best_implementation, page_width, ragged_paged_attention, unsupported
from pallas_kernels.ragged_paged_attention.tables import Table, file_name, read_table, write_table

__all__ = ["Table", "best_implementation", "file_name", "page_width", "ragged_paged_attention", "read_table", "unsupported", "write_table"]
