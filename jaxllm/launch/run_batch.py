"""`jaxllm run-batch`: OpenAI's batch files, without a server."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.logs import log_to_stderr

SHORT = {"-i": "--input-file", "-o": "--output-file"}


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Answer the requests of a file in OpenAI's batch form: a line each, {"custom_id", "method": "POST", "url", "body"}, with url
    /v1/chat/completions, /v1/completions, /v1/embeddings or /v1/responses.

    Answers are written as they are ready, not in the order of the requests; a request that is wrong has its error there. The same
    command again goes on where it was cut short.

    Example:

      jaxllm run-batch -i in.jsonl -o out.jsonl --model demo
    """

    input_file: str
    "JSONL file of requests (-i)."
    output_file: str
    "JSONL file of answers (-o), which is added to."
    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo` (135M parameters, about 100 MB, fetched once)."
    tokenizer: str | None = None
    "Folder or hub name of the tokenizer, when it is not the model's own."
    adapter: str | None = None
    "Folder of an adapter in PEFT's format (LoRA, DoRA, IA3), which is merged into the model's weights."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    "Of weights and activations; by default what fits the device."
    tensor_parallel_size: int | None = None
    "Devices to split the model over."
    max_model_len: int | None = None
    "Longest prompt plus answer, in tokens; by default the model's own limit, as far as memory allows."
    max_num_seqs: int | None = None
    "Sequences that run at the same time; by default 32."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    bundle: str | None = None
    "Load the programs that `jaxllm compile` has written to this folder, with its settings, instead of compiling."
    served_model_name: tuple[str, ...] = ()
    "Names that requests may call the model by; by default what --model says."
    tool_call_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "pythonic"] = "auto"
    "How the model writes its calls of tools; auto: as its chat template shows."
    reasoning_parser: Literal["auto", "none", "think"] = "auto"
    "Tell `<think>...</think>` apart from the answer, as reasoning_content; auto: if the chat template has it."
    unknown_fields: Literal["refuse", "warn"] = "refuse"
    "What becomes of a request with a field that is not implemented: an error, or a line in the log and the field is left out."


_SERVER = ("served_model_name", "tool_call_parser", "reasoning_parser", "unknown_fields")
_OWN = {"input_file", "output_file", *_SERVER} | {field.name for field in fields(Command)}


def run(config: Config) -> dict[str, Any]:
    """Answers all lines. Exit code 0 although some are errors: each says so itself."""
    source, output = Path(config.input_file), Path(config.output_file)
    if not source.is_file():
        raise ConfigError(f"input_file: there is no file {config.input_file}")
    try:
        from jaxllm.server.batch import read_done, run_batch
        from jaxllm.server.config import ServerConfig
        from jaxllm.server.service import Service
    except ImportError as error:
        raise ConfigError(f'run-batch needs {error.name}: pip install "jaxllm[serve]"') from error
    log_to_stderr("WARNING")
    read_done(output, source)  # what is wrong there is said before the model is loaded
    from jaxllm import AsyncLLM
    from jaxllm.serving.progress import ProgressLine

    said = {field.name: getattr(config, field.name) for field in fields(Config) if field.name not in _OWN}
    options = {name: value for name, value in said.items() if value is not None}
    if config.bundle is None:
        options.setdefault("max_num_seqs", 32)
    llm = AsyncLLM(**options)
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    progress = ProgressLine("answering", "requests")
    try:
        service = Service(llm, ServerConfig(max_pending=1 << 30, **{name: getattr(config, name) for name in _SERVER}))
        # Twice as many as run, so that none waits for a tokenizer.
        at_once = 2 * llm.max_num_seqs
        counts = asyncio.run(run_batch(service, source, output, at_once=at_once, progress=lambda done: progress(done, total)))
    finally:
        llm.shutdown()
    print(f"{counts.completed} answered ({counts.failed} with errors), {counts.resumed} were there", file=sys.stderr)
    return {"completed": counts.completed, "failed": counts.failed, "resumed": counts.resumed, "output_file": config.output_file}
