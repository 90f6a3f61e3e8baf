"""`jaxllm compile`: every program of an engine, compiled once and carried to where it will run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Compile every program that an engine with these settings will ever run, and write them to a folder, a bundle.

    LLM(bundle=FOLDER) and the flag --bundle load them instead of compiling, with these settings. A bundle serves machines
    with the same processors, devices and versions; elsewhere it is refused with the reason, and everything is compiled.

    Example:

      jaxllm compile --model demo --out demo.bundle --max-num-seqs 16
      jaxllm generate --model demo --bundle demo.bundle --prompt "The capital of France is"
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    out: str
    "The folder to write."
    max_num_seqs: int = 8
    "Requests that run at the same time."
    max_model_len: int | None = None
    "Tokens of prompt and output together; by default the model's own limit, as far as memory allows."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    page_size: int | None = None
    "Tokens in a page of the KV cache; by default the engine's choice."
    num_pages: int | None = None
    "Pages in the KV cache; by default as many as all requests need, as far as memory allows."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and KV cache; auto fits the device."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    "Of the KV cache, if another."
    attention_backend: Literal["auto", "xla", "tpu", "gpu"] = "auto"
    "auto takes the device's own kernels where they can do it."
    tensor_parallel_size: int = 1
    "Devices to split the model over."
    overwrite: bool = False
    "Replace the folder if it is there and holds a bundle."


def run(config: Config) -> dict[str, Any]:
    import jax

    from jaxllm import LLM
    from jaxllm.checkpoints.writer import whole_folder
    from jaxllm.serving.bundle import MANIFEST, write_manifest

    out = Path(config.out)
    if out.exists() and not (config.overwrite and (out / MANIFEST).is_file()):
        remedy = "give --overwrite to replace it" if (out / MANIFEST).is_file() else "it is no bundle: name another folder"
        raise ConfigError(f"{out} exists: {remedy}")
    if jax.config.jax_compilation_cache_dir:
        raise ConfigError("what comes out of JAX's own compilation cache cannot be written whole: unset JAX_COMPILATION_CACHE_DIR")
    options = {
        name: getattr(config, name)
        for name in (
            "max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size", "num_pages", "dtype", "tensor_parallel_size",
            "kv_cache_dtype", "attention_backend",
        )
    }  # fmt: skip
    start = time.perf_counter()
    try:
        with whole_folder(out) as folder:
            llm = LLM(config.model, **options, skip_tokenizer_init=True, warmup_in_background=False, compilation_cache_dir=str(folder))
            limits = llm.engine.limits
            settings = {name: getattr(limits, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size")}
            settings |= {
                "num_pages": llm.engine.pool.capacity,
                "dtype": llm.engine.runner.dtype.name,
                "tensor_parallel_size": config.tensor_parallel_size,
                "kv_cache_dtype": config.kv_cache_dtype,
                "attention_backend": config.attention_backend,
            }
            manifest = write_manifest(folder, llm.engine.runner.cache, settings)
    except OSError as error:  # a program that could not be kept is missing when the manifest is written
        raise ConfigError(f"{out} cannot be written (is the disk full?): {error}") from error
    size = sum(program["bytes"] for program in manifest["programs"].values())
    print(f"wrote {len(manifest['programs'])} programs, {size / 2**20:.1f} MiB, to {out}", file=sys.stderr)
    report = {"programs": len(manifest["programs"]), "bytes": size, "compile_s": llm.timings["compile_s"]}
    return {"out": str(out), **report, "seconds": time.perf_counter() - start, "settings": settings}
