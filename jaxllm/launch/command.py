"""What commands share: their common flags, how they load a model, and the numbers they report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from jaxllm import LLM, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Command:
    """Base of every command's settings."""

    json: bool = False
    "Print one JSON object as the last line of stdout, and everything else to stderr."

    def check_counts(self, *names: str) -> None:
        """Raises ConfigError for a flag that is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """Flags of the commands that load a model and sample from it. LLM and SamplingParams check the values."""

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo` (135M parameters, about 100 MB, fetched once)."
    tokenizer: str | None = None
    "Folder or hub name of the tokenizer, when it is not the model's own."
    adapter: str | None = None
    "Folder of an adapter in PEFT's format (LoRA, DoRA, IA3), which is merged into the model's weights."
    max_tokens: int = 256
    "Stop after this many new tokens."
    temperature: float = 0.0
    "0 takes the likeliest token each time; higher is more random."
    top_k: int = 0
    "Sample among the k likeliest tokens only; 0 means all."
    top_p: float = 1.0
    "Sample among the likeliest tokens that together hold this probability."
    seed: int | None = None
    "Makes sampling repeatable, whoever else shares the batch."
    stop: tuple[str, ...] = ()
    "End the answer before this text."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    "Of the KV cache; auto is dtype, and fp8 takes half of bfloat16's memory."
    max_model_len: int | None = None
    "Longest prompt plus answer, in tokens; by default the model's own limit, as far as memory allows."
    tensor_parallel_size: int = 1
    "Devices to split the model over."
    bundle: str | None = None
    "Load the programs that `jaxllm compile` has written to this folder, with its settings, instead of compiling."
    record: str | None = None
    "Write all that the scheduler is told and plans to this file, for `jaxllm simulate --replay`."
    warmup: bool | None = None
    "Compile every program before the first token; else each when it is needed. On by default, but not for one prompt."


def load_model(config: ModelCommand, *, max_num_seqs: int, warmup: bool, enable_prefix_caching: bool = True) -> LLM:
    """Loads the model that the flags name; says so on stderr, for it takes seconds. `warmup`: when no flag says. With a bundle, the
    settings are the bundle's, and all its programs are loaded."""
    from jaxllm import LLM

    options = {
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "warmup": config.warmup,
    }
    if config.bundle is None:
        options |= {"max_num_seqs": max_num_seqs, "enable_prefix_caching": enable_prefix_caching}
        options["warmup"] = warmup if config.warmup is None else config.warmup
    else:  # what no flag says is the bundle's
        unset = {field.name: field.default for field in fields(config)}
        options = {name: value for name, value in options.items() if value != unset[name]}
    print(f"loading {config.model} ...", file=sys.stderr, flush=True)
    return LLM(config.model, tokenizer=config.tokenizer, adapter=config.adapter, record=config.record, bundle=config.bundle, **options)


def sampling_params(config: ModelCommand) -> SamplingParams:
    """The flags' sampling settings, as the Python API has them. A wrong one is a wrong flag here: ConfigError.

    Call it before `load_model`: a mistake should not cost the seconds of loading.
    """
    from jaxllm import SamplingParams

    try:
        return SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            stop=config.stop,
        )
    except RequestError as error:
        raise ConfigError(str(error)) from error


def speed(output: Any) -> dict[str, float | None]:
    """Of a finished RequestOutput: ttft_s (seconds to the first token) and decode_tokens_per_s (None below two tokens)."""
    metrics, tokens = output.metrics, len(output.outputs[0].token_ids)
    if metrics.first_token_time is None:
        return {"ttft_s": None, "decode_tokens_per_s": None}
    decoding = metrics.finished_time - metrics.first_token_time
    rate = (tokens - 1) / decoding if tokens > 1 and decoding > 0 else None
    return {"ttft_s": metrics.first_token_time - metrics.arrival_time, "decode_tokens_per_s": rate}


def usage(outputs: Sequence[Any]) -> dict[str, int]:
    """Token counts over RequestOutputs, named as OpenAI names them."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
