"""`jaxllm bench structured`: whether structured output is valid, and what it costs a token."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.launch.bench.schemas import draw_schemas, endless
from jaxllm.launch.command import Command


class StructuredError(JaxLLMError):
    """A text that is not valid under its schema, or not as long as was asked for."""


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Generate JSON under schemas drawn at random and check each text against its schema; then time a batch of outputs of one length,
    under a schema and free, in turn. Fails if a text is not valid.

    Example:

      jaxllm bench structured --model demo --temperature 100 --json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    num_requests: int = 1000
    "Texts to generate and check."
    num_schemas: int = 50
    "Schemas, each for as many of them."
    temperature: float = 1.0
    "Of sampling; at 100 a model's weights are as good as random."
    max_tokens: int = 800
    "Tokens of a text: one that is cut off is not valid."
    max_num_seqs: int = 32
    "Requests that run at the same time."
    output_len: int = 128
    "Tokens of each output that is timed."
    repeats: int = 3
    "Times that count, after one that does not; the figure is the ratio of their medians."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."

    def __post_init__(self) -> None:
        self.check_counts("num_requests", "num_schemas", "max_tokens", "output_len", "repeats")
        for module in ("jsonschema", "llguidance"):
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"bench structured needs the package {module}: pip install {module}")


def run(config: Config) -> dict[str, Any]:
    from jaxllm import LLM

    length = max(config.max_tokens, config.output_len) + 32
    llm = LLM(config.model, dtype=config.dtype, max_num_seqs=config.max_num_seqs, max_model_len=length, warmup_in_background=False)
    wrong = _check(config, llm)
    times = _time(config, llm)
    overhead = times["constrained_s"] / times["free_s"] - 1
    tokens = config.max_num_seqs * config.output_len
    print(
        f"{config.num_requests - len(wrong)} of {config.num_requests} texts are valid under their schemas ({config.num_schemas}); "
        f"{tokens} tokens, {config.max_num_seqs} at a time, take {100 * overhead:+.1f}% under a schema"
    )
    if wrong:
        raise StructuredError(f"{len(wrong)} texts are not valid, the first: {wrong[0]}")
    stats = llm.engine.runner.stats
    return {
        "valid": config.num_requests,
        "overhead": round(overhead, 4),
        **times,
        "compiles_after_warmup": stats.compiles_after_warmup,
        "model": config.model,
        "num_schemas": config.num_schemas,
        "max_num_seqs": config.max_num_seqs,
    }


def _check(config: Config, llm) -> list[str]:
    """What is wrong with each text that is not valid."""
    import jsonschema

    schemas = draw_schemas(config.num_schemas)
    asked = [schemas[i % len(schemas)] for i in range(config.num_requests)]
    params = [_params(config, schema, seed, max_tokens=config.max_tokens) for seed, schema in enumerate(asked)]
    start, wrong = time.perf_counter(), []
    for output, schema in zip(llm.generate([f"Item {i}:" for i in range(len(asked))], params), asked, strict=True):
        text = output.outputs[0].text
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{text!r:.200} under {json.dumps(schema)} ({str(error).splitlines()[0]})")
    print(f"{len(asked)} texts in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return wrong


def _time(config: Config, llm) -> dict[str, float]:
    """Seconds of a batch, under a schema and free, in turn."""
    prompts = [f"Item {i}:" for i in range(config.max_num_seqs)]
    taken: dict[str, list[float]] = {"free_s": [], "constrained_s": []}
    for repeat in range(config.repeats + 1):
        for name, schema in (("free_s", None), ("constrained_s", endless())):
            params = [_params(config, schema, seed, max_tokens=config.output_len, ignore_eos=True) for seed in range(len(prompts))]
            llm.reset_prefix_cache()
            start = time.perf_counter()
            drawn = sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params))
            if drawn != (wanted := len(prompts) * config.output_len):
                raise StructuredError(f"{drawn} tokens came in place of {wanted}: times cannot be compared")
            if repeat:
                taken[name].append(time.perf_counter() - start)
                print(f"{name.removesuffix('_s')}, run {repeat}: {taken[name][-1]:.2f} s", file=sys.stderr)
    return {name: round(median(values), 4) for name, values in taken.items()}


def _params(config: Config, schema: dict[str, Any] | None, seed: int, **options: Any):
    from jaxllm import SamplingParams

    structured = None if schema is None else {"json": schema, "disable_any_whitespace": True}
    return SamplingParams(temperature=config.temperature, seed=seed, structured_outputs=structured, **options)
