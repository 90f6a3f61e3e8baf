"""Finds the quickest block sizes on the device that is here, by measuring: from the heuristic's on, one number at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.stored import as_stored
from pallas_kernels.ragged_paged_attention.tables import Entry, Table
from pallas_kernels.ragged_paged_attention.tuning import (
    GpuBlocks,
    TpuBlocks,
    Work,
    decode_splits,
    fewer_rows,
    gpu_blocks,
    tpu_blocks,
    why_illegal,
)

_GAIN = 0.97  # of the time of the best so far: less of a difference may be noise
_ENOUGH_S = 0.02  # that one measurement takes at least
_QUERIES = (16, 32, 64, 128, 256)
_GPU_FIELDS = {
    "keys": (16, 32, 64, 128),
    "rows": (16, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4),
    "split": (256, 512, 1024, 2048),
}
_BLOCK_KEYS = (64, 128, 256, 512, 1024, 2048)  # of a TPU's block, in pages


class Load(NamedTuple):
    """What is measured with: decode of `sequences` with up to `keys` keys; chunks of `tokens` in all, of sequences as long."""

    sequences: int = 64
    keys: int = 2048
    tokens: int = 2048


Blocks = TpuBlocks | GpuBlocks


def tune(
    platform: str,
    work: Work,
    load: Load,
    *,
    interpret: bool = False,
    rounds: int = 5,
    progress: Callable[[Blocks, float | None, str], None] = lambda *_: None,
) -> Entry:
    """The quickest blocks that compile and agree with the heuristic's result. `progress` is told of each: seconds a call, or why not.

    `interpret` measures the interpreter, on any machine: for tests. Raises what the heuristic's blocks raise, if they do.
    """
    heuristic = (tpu_blocks if platform == "tpu" else gpu_blocks)(work)
    run = _Measurement(platform, work, load, interpret, rounds)
    times: dict[Blocks, float] = {heuristic: run.first(heuristic)}
    progress(heuristic, times[heuristic], "the heuristic's")
    refused: set[Blocks] = set()
    best, better = heuristic, True
    while better:
        before = best
        for field in heuristic._fields:
            for candidate in candidates(work, best, field, load):
                if candidate in times or candidate in refused:
                    continue
                try:
                    times[candidate] = run.seconds(candidate)
                    progress(candidate, times[candidate], "")
                except Exception as error:  # compilers raise anything, and these blocks are then none to choose
                    refused.add(candidate)
                    progress(candidate, None, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
            quickest = min(times, key=times.get)
            if times[quickest] < _GAIN * times[best]:
                best = quickest
        better = best != before
    return Entry(work, best, times[best], times[heuristic])


def candidates(work: Work, blocks: Blocks, field: str, load: Load) -> list[Blocks]:
    """Blocks that differ in one number, are legal, and do not come to the same with as few keys and tokens as are measured with."""
    if isinstance(blocks, TpuBlocks):
        values = {"pages": [max(1, keys // work.page_size) for keys in _BLOCK_KEYS], "queries": _QUERIES}[field]
    else:
        values = _GPU_FIELDS[field]
    found = {}
    for other in (blocks._replace(**{field: value}) for value in values):
        if why_illegal(work, other) is None:
            found.setdefault(_as_measured(work, other, load), other)
    found.pop(_as_measured(work, blocks, load), None)
    return list(found.values())


def _as_measured(work: Work, blocks: Blocks, load: Load) -> Blocks:
    """What the kernel makes of them."""
    keys = -(-load.keys // work.page_size) * work.page_size
    if isinstance(blocks, TpuBlocks):
        return TpuBlocks(min(blocks.pages, keys // work.page_size), min(blocks.queries, -(-load.tokens // 16) * 16))
    if work.kernel == "chunks":
        return fewer_rows(blocks, work, load.tokens)
    return blocks._replace(split=min(keys, decode_splits(keys, blocks)[1]))


class _Measurement:
    """Calls of the op with the arrays of a load, a sequence in its own pages, in no order."""

    def __init__(self, platform: str, work: Work, load: Load, interpret: bool, rounds: int):
        if platform == "tpu":
            from pallas_kernels.ragged_paged_attention.tpu import ragged_paged_attention_tpu as function
        else:
            from pallas_kernels.ragged_paged_attention.gpu import ragged_paged_attention_gpu as function
        decode = work.kernel == "decode"
        options = dict(scale=work.width**-0.5, window=None, softcap=None, sinks=None, decode_only=decode, interpret=interpret)
        self._function, self._work, self._rounds, self._repeats = partial(function, **options), work, rounds, 1
        self._inputs, self._pages = _arrays(work, load)
        self._expected: Sequence[np.ndarray] | None = None

    def first(self, blocks: Blocks) -> float:
        """Those that the others must agree with; how long they take says how many calls to measure at a time."""
        self._repeats = min(200, max(1, round(_ENOUGH_S / self.seconds(blocks))))
        return self.seconds(blocks)

    def seconds(self, blocks: Blocks) -> float:
        """Of a call: of so many in a row on the device, the least of some rounds. Raises ValueError if the results are others."""
        table = Table("here", (Entry(self._work, blocks, 0.0, 0.0),))

        @partial(jax.jit, donate_argnums=0)
        def calls(pages, inputs):
            q, k, v, *rest = inputs
            once = lambda _, carry: self._function(q, k, v, carry[1], *rest, tuned=table)
            return jax.lax.fori_loop(0, self._repeats, once, (jnp.zeros_like(q), pages))

        calls = calls.lower(self._pages, self._inputs).compile()
        out, pages = jax.block_until_ready(calls(jnp.copy(self._pages), self._inputs))
        self._check(out, pages)
        times = []
        for _ in range(self._rounds):
            start = time.perf_counter()
            out, pages = jax.block_until_ready(calls(pages, self._inputs))
            times.append(time.perf_counter() - start)
        return min(times) / self._repeats

    def _check(self, *results: jax.Array) -> None:
        results = [np.asarray(x.astype(jnp.float32)) for x in results]
        if self._expected is None:
            self._expected = results
        tolerance = 1e-4 if self._work.dtype == "float32" else 3e-2
        for found, expected in zip(results, self._expected, strict=True):
            if not np.allclose(found, expected, atol=tolerance, rtol=tolerance):
                raise ValueError(f"its results are up to {np.abs(found - expected).max():.2g} from those of the heuristic's blocks")


def _arrays(work: Work, load: Load) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The op's arguments but the pages, and the pages."""
    rng = np.random.default_rng(0)
    if work.kernel == "decode":
        counts = np.ones(load.sequences, np.int64)
        kv_lens = np.linspace(load.keys / 2, load.keys, load.sequences)
    else:
        counts = np.full(min(4, load.tokens), load.tokens // min(4, load.tokens))
        counts = np.minimum(counts, load.keys)
        kv_lens = np.linspace(counts[0], load.keys, len(counts))  # the first is a whole prompt, the others the ends of longer ones
    kv_lens, columns = kv_lens.astype(np.int32), -(-load.keys // work.page_size)
    table = rng.permutation(len(counts) * columns).reshape(len(counts), columns).astype(np.int32)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    phases = np.array([len(counts) if work.kernel == "decode" else 0, len(counts)], np.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    tokens = int(starts[-1])
    q = draw(keys[0], tokens, work.heads, work.width).astype(work.dtype)
    k, v = (draw(key, tokens, work.kv_heads, work.width).astype(work.dtype) for key in keys[1:3])
    pages = as_stored(draw(keys[3], table.size, 2, work.kv_heads, work.page_size, work.width), jnp.dtype(work.kv_dtype))
    return (q, k, v, *map(jnp.asarray, (table, kv_lens, starts, phases))), pages
