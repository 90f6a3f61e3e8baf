"""`jaxllm bench serve`: a server under load."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm.launch.bench.http_client import Measured
    from jaxllm.launch.bench.load import LoadRequest


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Measure any OpenAI-compatible server, in the manner of `vllm bench serve` and with the names of its results.

    Examples:

      jaxllm bench serve --base-url http://127.0.0.1:8000 --num-prompts 100 --request-rate 4
      jaxllm bench serve --base-url http://127.0.0.1:8000 --dataset trace --dataset-path mooncake_trace.jsonl --goodput.ttft 500
    """

    base_url: str = "http://127.0.0.1:8000"
    "Where the server is, without /v1. The key, if it wants one, is in OPENAI_API_KEY."
    model: str | None = None
    "The model to ask for; by default the server's own choice."
    endpoint: Literal["completions", "chat"] = "completions"
    "Which of the two to measure; chat takes texts only (sharegpt)."
    dataset: Literal["random", "sharegpt", "trace"] = "random"
    "random token ids; conversations in ShareGPT's form; or lengths and times of Azure's or Mooncake's trace."
    dataset_path: str | None = None
    "The file, for all but random."
    num_prompts: int = 100
    "Requests in all."
    input_len: int = 128
    "Tokens of a random prompt."
    output_len: int | None = None
    "Tokens of an answer; by default 128, or what the dataset says."
    range_ratio: float = 0.0
    "Random lengths vary by this share to both sides."
    prefix_len: int = 0
    "Tokens that all random prompts begin with, besides."
    vocab_size: int = 10000
    "Random token ids are below this; the model's vocabulary must be as large."
    request_rate: float = math.inf
    "Requests that arrive in a second; inf: all at once, or when the trace says."
    burstiness: float = 1.0
    "1: a Poisson process; less is burstier, more is more even."
    time_scale: float = 1.0
    "The trace's seconds are so many of ours."
    max_concurrency: int | None = None
    "Requests that are under way at most; others wait, and their time counts from when they are sent."
    goodput: dict[str, float] | None = None
    "Limits in ms of ttft, tpot, e2el: a request that meets all of those given is good."
    num_warmups: int = 1
    "Requests before those that count."
    temperature: float = 0.0
    "Of all requests."
    seed: int = 0
    "Draws prompts and arrivals."

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("request_rate", "burstiness", "time_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio must be from 0 to below 1, not {self.range_ratio}")
        if (self.dataset == "random") != (self.dataset_path is None):
            raise ConfigError("dataset_path is for dataset sharegpt and trace, which need it")
        if self.endpoint == "chat" and self.dataset != "sharegpt":
            raise ConfigError("endpoint chat needs texts: dataset sharegpt")
        if unknown := set(self.goodput or ()) - {"ttft", "tpot", "e2el"}:
            raise ConfigError(f"goodput has no {sorted(unknown)[0]!r}: give ttft, tpot or e2el, in ms")


def run(config: Config) -> dict[str, Any]:
    load = _load(config)
    measured, seconds = asyncio.run(_drive(config, load))
    result = figures(measured, seconds, config.goodput)
    if not result["completed"]:
        raise JaxLLMError(f"no request has succeeded; the first one's error: {measured[0].error}")
    head = {"base_url": config.base_url, "model_id": config.model, "dataset": config.dataset, "num_prompts": len(load)}
    rate = {"request_rate": "inf" if math.isinf(config.request_rate) else config.request_rate, "burstiness": config.burstiness}
    result = head | rate | {"max_concurrency": config.max_concurrency} | result
    for name, value in result.items():
        if name != "errors":
            print(f"{name:28} {f'{value:.2f}' if isinstance(value, float) else value}")
    for error in result["errors"]:
        print(f"failed: {error}", file=sys.stderr)
    return result


def _load(config: Config) -> list[LoadRequest]:
    import numpy as np

    from jaxllm.launch.bench.load import random_load, sharegpt_load, trace_load

    rng = np.random.default_rng(config.seed)
    if config.dataset == "sharegpt":
        return sharegpt_load(config.dataset_path, config.num_prompts, config.output_len)
    if config.dataset == "trace":
        return trace_load(rng, config.dataset_path, config.num_prompts, vocab_size=config.vocab_size)
    return random_load(
        rng,
        config.num_prompts,
        input_len=config.input_len,
        output_len=config.output_len or 128,
        range_ratio=config.range_ratio,
        prefix_len=config.prefix_len,
        vocab_size=config.vocab_size,
    )


async def _drive(config: Config, load: list[LoadRequest]) -> tuple[list[Measured], float]:
    import numpy as np

    from jaxllm.launch.bench.http_client import stream
    from jaxllm.launch.bench.load import arrivals

    path = "chat/completions" if config.endpoint == "chat" else "completions"
    url = f"{config.base_url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
    places = asyncio.Semaphore(config.max_concurrency or len(load))

    async def one(request: LoadRequest) -> Measured:
        said = {"messages": [{"role": "user", "content": request.prompt}]} if config.endpoint == "chat" else {"prompt": request.prompt}
        body = said | {"max_tokens": request.output_len, "temperature": config.temperature, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | ({} if config.model is None else {"model": config.model})
        async with places:
            return await stream(url, body, headers)

    for request in load[: config.num_warmups]:
        if (error := (await one(request)).error) is not None:
            raise JaxLLMError(f"the first request has failed: {error}")
    times = [request.at * config.time_scale if request.at is not None else 0.0 for request in load]
    if not math.isinf(config.request_rate):
        times = list(arrivals(np.random.default_rng(config.seed + 1), len(load), config.request_rate, config.burstiness))
    start, tasks = time.perf_counter(), []
    for request, at in zip(load, times, strict=True):
        if (wait := start + at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(request)))
    measured = await asyncio.gather(*tasks)
    return list(measured), time.perf_counter() - start


def figures(measured: list[Measured], seconds: float, goodput: dict[str, float] | None = None) -> dict[str, Any]:
    """vLLM's: times in ms, rates a second. ITL is between events, which a server may fill with more than one token."""
    import numpy as np

    done = [each for each in measured if each.error is None]
    several = [each for each in done if each.output_tokens > 1]
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(measured) - len(done),
        "total_input_tokens": sum(each.prompt_tokens for each in done),
        "total_output_tokens": sum(each.output_tokens for each in done),
    }
    result["request_throughput"] = len(done) / seconds
    result["output_throughput"] = result["total_output_tokens"] / seconds
    result["total_token_throughput"] = (result["total_input_tokens"] + result["total_output_tokens"]) / seconds
    samples = {
        "ttft": [each.ttft for each in done],
        "tpot": [each.tpot for each in several],
        "itl": [gap for each in done for gap in each.itl],
        "e2el": [each.latency for each in done],
    }
    for name, values in samples.items():
        ms = 1e3 * np.asarray(values or [0.0])
        result |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms)), f"std_{name}_ms": float(ms.std())}
        result[f"p99_{name}_ms"] = float(np.percentile(ms, 99))
    if goodput:
        times = lambda each: {"ttft": each.ttft, "tpot": each.tpot if each.output_tokens > 1 else 0.0, "e2el": each.latency}
        good = [each for each in done if all(1e3 * times(each)[name] <= limit for name, limit in goodput.items())]
        result["request_goodput"] = len(good) / seconds
    return result | {"errors": sorted({each.error for each in measured if each.error is not None})}
