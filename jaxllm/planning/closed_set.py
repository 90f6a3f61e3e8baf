"""The closed set of an engine on this machine, compiled as the engine's warm-up does it; and what that takes of the host's memory, of
which XLA's CPU compiler does not tell (its `generated_code_size` is 0)."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.host_memory import PeakMemory, own_bytes, trim
from jaxllm.serving.batch import Bucket, step_layout
from jaxllm.serving.programs import LayerByLayer
from jaxllm.serving.warm_up import WarmUp


@dataclass(frozen=True)
class CompiledSet:
    """Every step's programs, (first, layers by kind, rows, head), and the seconds of each; bytes of host memory: what the process held
    before (`runtime`), what the programs hold, and what compiling took beside that at most."""

    programs: dict[Bucket, tuple[Any, ...]]
    seconds: dict[Bucket, float]
    runtime: int
    held: int
    compiling: int


def compile_closed_set(engine: LayerByLayer, buckets: Sequence[Bucket], max_pages: int) -> CompiledSet:
    """Like `Runner.warm_up`, on as many threads. The small programs, which move pages or write slots, hold less than a MiB together and are
    left out."""
    compiler = _Compiler(engine, max_pages)
    trim()
    before = own_bytes()
    with PeakMemory() as peak:
        warm_up = WarmUp(buckets[::-1], compiler.compile, os.cpu_count() or 2)
        warm_up.wait()
    trim()
    held = max(0, own_bytes() - before)
    programs = {bucket: warm_up.get(bucket) for bucket in buckets}
    return CompiledSet(programs, compiler.seconds, before, held, max(0, peak.bytes - before - held))


class _Compiler:
    def __init__(self, engine: LayerByLayer, max_pages: int):
        self._engine, self._max_pages = engine, max_pages
        self.seconds: dict[Bucket, float] = {}

    def compile(self, bucket: Bucket) -> tuple[Any, ...]:
        start = time.perf_counter()
        programs = self._engine.compile(bucket, step_layout(bucket, self._max_pages))
        self.seconds[bucket] = time.perf_counter() - start
        return programs
