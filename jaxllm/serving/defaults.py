"""What an engine chooses where it is told nothing, by the platform that it runs on; a plan chooses the same."""

from collections.abc import Mapping
from typing import Any

_CPU_POOL_BYTES = 1 << 30  # of KV cache on the CPU, where memory is everybody's, unless one request of the length asked for needs more


def default_dtype(platform: str, entries: Mapping[str, Any]) -> str:
    """Of weights and activations: what the model's config.json says on TPU and GPU, bfloat16 if that is none of the three; float32 on the
    CPU."""
    stored = entries.get("torch_dtype") or entries.get("dtype")
    return "float32" if platform == "cpu" else stored if stored in ("float32", "float16") else "bfloat16"


def scans_layers(platform: str) -> bool:
    """Whether repeated layers run in a loop; on the CPU that copies their weights."""
    return platform != "cpu"


def default_page_size(platform: str) -> int:
    return 8 if platform == "cpu" else 64


def default_batched_tokens(platform: str, max_num_seqs: int) -> int:
    """Tokens in one step."""
    return max(512 if platform == "cpu" else 2048, max_num_seqs)


def pool_pages(platform: str, max_num_seqs: int, pages_of_one: int, a_page: int, *, room: int | None = None, least: int = 0) -> int:
    """Pages in the pool, the one that padding points at included: for `max_num_seqs` sequences of `pages_of_one` pages of `a_page` bytes,
    within `room` bytes (None: any). On the CPU no more than a GiB, or `least` bytes if that is more."""
    bounds = [room, max(_CPU_POOL_BYTES, least) if platform == "cpu" else None]
    pages = min([max_num_seqs * pages_of_one, *(bound // a_page for bound in bounds if bound is not None)])
    return max(2, pages + 1)
