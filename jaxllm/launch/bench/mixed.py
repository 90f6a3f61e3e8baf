"""`jaxllm bench mixed`: every kind of request at once."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.bench.common import memory, per_step
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    import numpy as np

    from jaxllm import RequestOutput, SamplingParams
    from jaxllm.serving.engine import Engine
    from jaxllm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """A load as mixed as can be: prompts of all lengths, arriving at random, with every sampling feature, some of them aborted.

    Counts what must be zero (programs compiled after warm-up) and what should be small (kv_waste: the share of the KV cache's
    pages in use that holds no token).

    Example:

      jaxllm bench mixed --model demo --num-requests 500 --json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    num_requests: int = 500
    "Requests in all."
    max_input_len: int = 1500
    "Tokens of the longest prompt; as many are of one to two tokens as of half the longest to the longest."
    max_output_len: int = 64
    "Tokens of the longest output."
    requests_per_step: float = 0.5
    "How many arrive in a step, on average."
    max_num_seqs: int = 64
    "Sequences that run at the same time."
    max_num_batched_tokens: int | None = None
    "Tokens in one step; by default the engine's choice."
    page_size: int | None = None
    "Tokens in a page of the KV cache; by default the engine's choice."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    "Of weights and activations; auto fits the device."
    seed: int = 0
    "Draws the requests."
    record: str | None = None
    "Write all that the scheduler is told and plans to this file, for `jaxllm simulate --replay`; it costs some speed."

    def __post_init__(self) -> None:
        self.check_counts("num_requests", "max_input_len", "max_output_len")
        if not self.requests_per_step > 0:
            raise ConfigError(f"requests_per_step must be above 0, got {self.requests_per_step}")


@dataclass(frozen=True)
class MixedRequest:
    """`arrival`: the step before which it comes; `abort_after`: the steps after which it leaves, finished or not."""

    arrival: int
    prompt_token_ids: list[int]
    params: SamplingParams
    abort_after: int | None = None


@dataclass
class Outcome:
    """What became of the requests, by number. Of those that were aborted, `outputs` has none."""

    outputs: dict[int, RequestOutput]
    aborted: set[int]


def run(config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    import numpy as np

    from jaxllm import LLM

    llm = LLM(
        config.model,
        dtype=config.dtype,
        max_model_len=config.max_input_len + config.max_output_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        scheduling_policy="priority",
        logits_processors=PROCESSORS,
        record=config.record,
    )
    engine, startup = llm.engine, time.perf_counter() - start
    print(f"ready after {startup:.1f} s", file=sys.stderr)
    engine.runner.finish_warm_up()
    requests = mixed_load(
        np.random.default_rng(config.seed),
        config.num_requests,
        vocab_size=engine.vocab_size,
        tokenizer=engine.tokenizer,
        max_input_len=config.max_input_len,
        max_output_len=config.max_output_len,
        requests_per_step=config.requests_per_step,
    )
    before, start = replace(engine.stats), time.perf_counter()
    outcome = drive(engine, requests)
    seconds = time.perf_counter() - start
    result = {"seconds": seconds} | _figures(outcome, seconds) | per_step(before, engine.stats, seconds)
    result = {name: round(value, 4) for name, value in result.items()}
    print(f"{result['output_tokens_per_s']:.1f} output tokens/s; {100 * result['kv_waste']:.2f}% of the pages in use held no token")
    return result | {
        "startup_s": round(startup, 2),
        "steps": engine.stats.steps - before.steps,
        "preemptions": engine.scheduler.num_preemptions,
        "finished": len(outcome.outputs),
        "aborted": len(outcome.aborted),
        "features": dict(features(requests)),
        "compiles": engine.runner.stats.compiles,
        "compiles_after_warmup": engine.runner.stats.compiles_after_warmup,
        "pages_leaked": engine.pool.capacity - engine.pool.num_free,
        **memory(engine),
        "model": config.model,
        "num_requests": config.num_requests,
    }


def _figures(outcome: Outcome, seconds: float) -> dict[str, float]:
    outputs = outcome.outputs.values()
    tokens = sum(len(o.token_ids) for output in outputs for o in output.outputs)
    prompts = sum(len(output.prompt_token_ids) for output in outputs)
    moments = [(o.metrics, max(len(c.token_ids) for c in o.outputs)) for o in outputs if o.metrics.first_token_time is not None]
    return {
        "output_tokens_per_s": tokens / seconds,
        "total_tokens_per_s": (tokens + prompts) / seconds,
        "ttft_ms": 1e3 * median(m.first_token_time - m.arrival_time for m, _ in moments) if moments else 0.0,
        "tpot_ms": 1e3 * median((m.finished_time - m.first_token_time) / max(1, n - 1) for m, n in moments) if moments else 0.0,
    }


def _sharpen(logits, tokens, length):
    """A logits processor that the load uses."""
    return logits * 2


PROCESSORS = {"sharpen": _sharpen}


def mixed_load(
    rng: np.random.Generator,
    num_requests: int,
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    max_input_len: int = 1500,
    max_output_len: int = 64,
    requests_per_step: float = 0.5,
) -> list[MixedRequest]:
    """Requests in the order in which they come, for an engine with `PROCESSORS`, max_logprobs of at least 8 and the policy
    `priority`. Lengths are log-uniform; every third prompt begins as others do. Words and stop strings need the tokenizer."""
    low, high = (100, 40_000) if vocab_size > 40_000 else (3, vocab_size)
    common = rng.integers(low, high, max_input_len).tolist()
    requests, step = [], 0.0
    for _ in range(num_requests):
        step += rng.exponential(1 / requests_per_step)
        length = int(max_input_len ** rng.random()) if max_input_len > 1 else 1
        shared = int(rng.integers(0, length)) if rng.random() < 1 / 3 else 0
        prompt = common[:shared] + rng.integers(low, high, length - shared).tolist()
        params = _params(rng, low, high, tokenizer, 1 + int(rng.integers(max_output_len)))
        abort_after = int(rng.integers(40)) if rng.random() < 0.1 else None
        requests.append(MixedRequest(int(step), prompt, params, abort_after))
    return requests


def _params(rng: np.random.Generator, low: int, high: int, tokenizer: Tokenizer | None, max_tokens: int) -> SamplingParams:
    """One request's: greedy, sampled or a beam search; each feature that goes with it is in about one of four."""
    from jaxllm import SamplingParams

    some = lambda chance=0.25: rng.random() < chance
    ids = lambda n: sorted({int(i) for i in rng.integers(low, high, n)})
    options: dict[str, Any] = {"max_tokens": max_tokens}
    chosen: dict[str, Any] = {
        "ignore_eos": True,
        "priority": int(rng.integers(-3, 4)),
        "truncate_prompt_tokens": int(rng.integers(1, 200)),
        "stop_token_ids": ids(4),
    }
    if some(0.06):
        options |= {"use_beam_search": True, "temperature": 0, "beam_width": 4, "n": int(rng.integers(1, 5))}
        options["length_penalty"] = float(rng.uniform(0, 2))
        return SamplingParams(**options, **{name: value for name, value in chosen.items() if some()})
    chosen |= {
        "presence_penalty": float(rng.uniform(-2, 2)),
        "frequency_penalty": float(rng.uniform(-2, 2)),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "logit_bias": {i: float(rng.uniform(-100, 10)) for i in ids(8)},
        "allowed_token_ids": ids((high - low) // 2),
        "min_tokens": int(rng.integers(0, max_tokens + 1)),
        "logprobs": int(rng.integers(0, 9)),
        "logits_processor": "sharpen",
    }
    if tokenizer is not None:
        words = [tokenizer.decode(ids(2)) for _ in range(4)]
        chosen |= {
            "stop": tuple(tokenizer.decode([i]) or "." for i in ids(3)),
            "bad_words": tuple(word for word in words if word.strip() and len(tokenizer.encode(word)) <= 6),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
    if some(0.3):
        options["temperature"] = 0
    else:
        options["temperature"] = float(rng.uniform(0.1, 1.5))
        chosen |= {
            "top_k": int(rng.integers(1, high)),
            "top_p": float(rng.uniform(0.1, 1)),
            "min_p": float(rng.uniform(0, 0.3)),
            "typical_p": float(rng.uniform(0.2, 1)),
            "seed": int(rng.integers(2**62)),
            "n": int(rng.integers(2, 5)),
        }
    options |= {name: value for name, value in chosen.items() if some()}
    if some(0.1):
        options["prompt_logprobs"] = int(rng.integers(0, 9))
    return SamplingParams(**options)


def features(requests: Sequence[MixedRequest]) -> Counter[str]:
    """How many requests use each sampling parameter."""
    from jaxllm import SamplingParams

    unset = SamplingParams()
    return Counter(name for request in requests for name, value in vars(request.params).items() if value != getattr(unset, name))


def drive(engine: Engine, requests: Sequence[MixedRequest]) -> Outcome:
    """Runs requests, which are in the order of their arrivals, to their ends. Each is answered once, or aborted."""
    outcome, leaving = Outcome({}, set()), {}
    step = i = 0
    while i < len(requests) or engine.has_work:
        if not engine.has_work and i < len(requests):
            step = max(step, requests[i].arrival)  # nothing happens until then
        while i < len(requests) and requests[i].arrival <= step:
            engine.add_request(requests[i].prompt_token_ids, requests[i].params, request_id=str(i))
            if requests[i].abort_after is not None:
                leaving.setdefault(step + requests[i].abort_after, []).append(i)
            i += 1
        for number in leaving.pop(step, ()):
            if number not in outcome.outputs:
                engine.abort(str(number))
                outcome.aborted.add(number)
        if engine.has_work:
            for output in engine.step():
                number = int(output.request_id)
                if number in outcome.outputs or number in outcome.aborted:
                    raise RuntimeError(f"request {number} was answered after its end: this is a bug in jaxllm, please report it")
                if output.finished:
                    outcome.outputs[number] = output
        step += 1
    return outcome
