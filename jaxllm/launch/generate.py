"""`jaxllm generate`: continue prompts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError
from jaxllm.launch.command import ModelCommand, load_model, sampling_params, speed, usage

if TYPE_CHECKING:
    from jaxllm import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config(ModelCommand):
    """Continue one prompt or several (as one batch).

    With --json: text, token_ids, finish_reason, usage, timings (load_s, compile_s, ttft_s, decode_tokens_per_s, total_s) and
    model; for several prompts `outputs` is a list of those. total_s is from loading's start to the last token.

    Examples:

      jaxllm generate --model demo --prompt "The capital of France is" --max-tokens 48
      jaxllm generate --model demo --chat --prompt-file question.txt --json
    """

    prompt: tuple[str, ...] = ()
    "The text to continue."
    prompt_file: str | None = None
    "Read the one prompt from this UTF-8 file, whole (`-` reads stdin)."
    chat: bool = False
    "Put each prompt in the model's chat template, as a user's message."
    system: str | None = None
    "With --chat: the system message."
    stream: bool | None = None
    "Print the text as it comes. On by default for one prompt, unless --json has its output piped."

    def __post_init__(self) -> None:
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ConfigError("give either --prompt (once or more) or --prompt-file")
        if self.system is not None and not self.chat:
            raise ConfigError("system needs --chat: a plain prompt has no system message")
        if self.stream and len(self.prompt) > 1:
            raise ConfigError("stream is for one prompt; several run as one batch, so leave --stream out")


def run(config: Config) -> dict[str, Any]:
    """Generates, printing texts to stdout and a line of numbers to stderr."""
    start = time.monotonic()
    texts = _prompts(config)
    params = sampling_params(config)
    several = len(texts) > 1  # one alone shares nothing, and then steps of one row are there, which are the fastest
    llm = load_model(config, max_num_seqs=min(_power_of_two(len(texts)), 64), warmup=several, enable_prefix_caching=several)
    prompts = [_token_ids(llm, text, config) for text in texts]
    _compile(llm, prompts, params)
    live = config.stream if config.stream is not None else len(prompts) == 1 and (not config.json or sys.stdout.isatty())
    if live:
        outputs = [_stream(llm, prompts[0], params, "" if config.chat else texts[0])]
    else:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        for i, output in enumerate(outputs):
            text = output.outputs[0].text
            print(text if len(outputs) == 1 else f"--- {i}: {texts[i]!r}\n{text}")
    total = time.monotonic() - start
    results = [_result(output, config.model, llm.timings, total) for output in outputs]
    _summary(outputs, llm.timings, total)
    return results[0] if len(results) == 1 else {"model": config.model, "outputs": results}


def _power_of_two(count: int) -> int:
    """The next one up. Programs are compiled for a batch size, so few sizes mean that most runs find theirs compiled."""
    return 1 << (count - 1).bit_length()


def _prompts(config: Config) -> list[str]:
    if config.prompt_file is None:
        return list(config.prompt)
    try:
        raw = sys.stdin.buffer.read() if config.prompt_file == "-" else Path(config.prompt_file).read_bytes()
        return [raw.decode("utf-8").removesuffix("\n")]
    except OSError as error:
        raise ConfigError(f"prompt_file: cannot read {config.prompt_file} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt_file: {config.prompt_file} is not UTF-8 text (byte {error.start}); convert it first") from error


def _token_ids(llm: LLM, text: str, config: Config) -> list[int]:
    tokenizer = llm.get_tokenizer()
    if not config.chat:
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    return tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}], add_generation_prompt=True)


def _compile(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> None:
    """Compiles what these prompts need, so that the speeds told are those of computing: two tokens each.

    The prompts go in reversed: of the same shape, but nothing that a cache of prefixes could serve again.
    """
    short = params.replace(max_tokens=min(2, params.max_tokens or 2), ignore_eos=True, stop=None)
    llm.generate([{"prompt_token_ids": prompt[::-1]} for prompt in prompts], short)


def _stream(llm: LLM, prompt: list[int], params: SamplingParams, shown_first: str) -> RequestOutput:
    """Prints the prompt's text, then the answer as it grows; returns the finished RequestOutput."""
    print(shown_first, end="", flush=True)
    printed, output = 0, None
    for output in llm.stream({"prompt_token_ids": prompt}, params):
        text = output.outputs[0].text
        print(text[printed:], end="", flush=True)
        printed = len(text)
    print()
    return output


def _result(output: Any, model: str, timings: dict[str, float], total: float) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "text": answer.text,
        "token_ids": [int(token) for token in answer.token_ids],
        "finish_reason": answer.finish_reason,
        "usage": usage([output]),
        "timings": {"load_s": timings["load_s"], "compile_s": timings["compile_s"], **speed(output), "total_s": total},
        "model": model,
    }


def _summary(outputs: list[Any], timings: dict[str, float], total: float) -> None:
    tokens = usage(outputs)["completion_tokens"]
    parts = [f"{tokens} tokens"]
    numbers = speed(outputs[0])
    if len(outputs) == 1 and numbers["decode_tokens_per_s"]:
        parts.append(f"{numbers['decode_tokens_per_s']:.1f} tokens/s after the first, which took {numbers['ttft_s']:.2f} s")
    parts.append(f"load {timings['load_s']:.1f} s, compile {timings['compile_s']:.1f} s, total {total:.1f} s")
    print("[" + "; ".join(parts) + "]", file=sys.stderr)
