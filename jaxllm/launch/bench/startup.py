"""`jaxllm bench startup`: how long until an engine is ready."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Seconds from this process's first import of JAX until requests can be served, and until every program is compiled, which
    may go on in the background (`EngineConfig.warmup_in_background`).

    With --cold, nothing that was compiled before is used.

    Example:

      jaxllm bench startup --model demo --max-num-seqs 64 --cold --json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    max_num_seqs: int = 64
    "Requests that run at the same time."
    max_model_len: int = 2048
    "Tokens of prompt and output together."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    cold: bool = False
    "Start without compiled programs from earlier runs."
    bundle: str | None = None
    "Start from this folder of programs (`jaxllm compile --out`), with its settings, and no others from earlier runs."

    def __post_init__(self) -> None:
        if self.bundle is not None and self.cold:
            raise ConfigError("cold is without programs, and bundle with them: give one")


def run(config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    from jaxllm import LLM

    with tempfile.TemporaryDirectory() as empty:
        sizes = dict(dtype=config.dtype, max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len)
        llm = LLM(
            config.model,
            compilation_cache_dir=empty if config.cold or config.bundle else None,
            **({"bundle": config.bundle} if config.bundle else sizes),
        )
        startup = time.perf_counter() - start
        runner = llm.engine.runner
        runner.finish_warm_up()
        everything = time.perf_counter() - start
    times = f"{llm.timings['compile_s']:.2f} s of compiling, {llm.timings['load_s']:.2f} s of loading"
    print(f"ready after {startup:.2f} s ({times}), all {runner.stats.compiles} programs there after {everything:.2f} s")
    result = {"startup_s": startup, **llm.timings, "all_programs_s": everything, "compiles": runner.stats.compiles}
    return result | {"cold": config.cold, "bundle": config.bundle, "model": config.model}
