"""`jaxllm serve`: a model over HTTP."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.logs import log_to_stderr
from jaxllm.server.config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class Config(ServerConfig, Command):
    """Serve a model over HTTP, as OpenAI's API: any client of it works with base_url=http://HOST:PORT/v1.

    Example:

      jaxllm serve demo --port 8000
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The capital of France is"}'
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo` (135M parameters, about 100 MB, fetched once)."
    tokenizer: str | None = None
    "Folder or hub name of the tokenizer, when it is not the model's own."
    adapter: str | None = None
    "Folder of an adapter in PEFT's format (LoRA, DoRA, IA3), which is merged into the model's weights."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "Of weights and activations; by default what fits the device."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] | None = None
    "Of the KV cache, if another."
    attention_backend: Literal["auto", "xla", "tpu", "gpu"] | None = None
    "By default the device's own kernels where they can do it."
    tensor_parallel_size: int | None = None
    "Devices to split the model over."
    max_model_len: int | None = None
    "Longest prompt plus answer, in tokens; by default the model's own limit, as far as memory allows."
    max_num_seqs: int | None = None
    "Sequences that run at the same time; by default 32."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    kv_cache_memory_bytes: int | None = None
    "Of the KV cache; by default what all sequences need, as far as memory allows."
    enable_prefix_caching: bool | None = None
    "Share the KV cache among requests that begin alike. On by default."
    host_kv_bytes: int | None = None
    "Host memory for pages that the device's KV cache has no room for; by default none."
    scheduling_policy: str | None = None
    "fcfs: first come, first served, the default; priority: by the requests' `priority`; vtc: fair shares for API keys; and others "
    "(docs/scheduling.md)."
    max_logprobs: int | None = None
    "The most likely tokens that a request may ask the log-probabilities of; by default 20."
    bundle: str | None = None
    "Load the programs that `jaxllm compile` has written to this folder, with its settings, instead of compiling."
    engine_process: bool = True
    "Run the engine in a process of its own, which is started again if it dies; false: in a thread of the server's."
    record: str | None = None
    "Write all that the scheduler is told and plans to this file, for `jaxllm simulate --replay`."
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    "How much is logged to stderr."


def run(config: Config) -> dict[str, Any]:
    """Serves until SIGTERM or SIGINT."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'serve needs {error.name}: pip install "jaxllm[serve]"') from error
    log_to_stderr(config.log_level.upper())
    from jaxllm.server.keys import read_keys
    from jaxllm.server.run import address, check_tls, listen, run_server

    read_keys(config.keys, config.api_key_file)  # what is wrong there is said before the model is loaded
    check_tls(config)
    listener = listen(config)
    from jaxllm import AsyncLLM

    print(f"loading {config.model} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    said = {field.name: getattr(config, field.name) for field in fields(Config) if field.name not in _OWN}
    options = {name: value for name, value in said.items() if value is not None}
    if config.bundle is None:
        options.setdefault("max_num_seqs", 32)
    llm = AsyncLLM(**options)
    listener.listen(2048)  # from now on clients are let in; until now they were refused
    where = address(config, listener)
    print(f"ready after {time.monotonic() - start:.1f} s at {where}/v1", file=sys.stderr, flush=True)
    run_server(llm, config, listener)
    return {"address": where}


_OWN = {field.name for field in fields(ServerConfig)} | {field.name for field in fields(Command)} | {"log_level"}
