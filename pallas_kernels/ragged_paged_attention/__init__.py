"""Attention of ragged queries over a paged key/value cache, for any mix of decode, chunked prefill and prefill."""

from pallas_kernels.ragged_paged_attention.api import best_implementation, page_width, ragged_paged_attention, unsupported
from pallas_kernels.ragged_paged_attention.tables import Table, file_name, read_table, write_table
from pallas_kernels.ragged_paged_attention.xla import loop_trips

__all__ = [
    "Table",
    "best_implementation",
    "file_name",
    "loop_trips",
    "page_width",
    "ragged_paged_attention",
    "read_table",
    "unsupported",
    "write_table",
]
