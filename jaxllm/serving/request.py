"""Requests and what comes back. Names follow vLLM's, so that a script moves by changing an import."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxllm.serving.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.serving.beam import BeamSearch
    from jaxllm.serving.output import TextStream
    from jaxllm.serving.structured import Matcher

# error: the model, or a logits processor, gave logits that nothing can be drawn from; stop_reason says so.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """Of one token at one place, by the model's own logits."""

    logprob: float
    rank: int | None = None  # 1: none is likelier
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """Moments in seconds, by `time.monotonic`; None: not yet."""

    arrival_time: float
    scheduled_time: float | None = None  # when a step first had a part of it
    first_token_time: float | None = None
    last_token_time: float | None = None  # of those so far
    finished_time: float | None = None


@dataclass
class CompletionOutput:
    """One generated continuation. Text and tokens are all those so far."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it, or what went wrong
    cumulative_logprob: float | None = None
    logprobs: "list[dict[int, Logprob]] | None" = None  # for each token: its own, and those of the likeliest

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request and its outputs so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    num_cached_tokens: int = 0  # of the prompt, that were in the KV cache already
    prompt_logprobs: "list[dict[int, Logprob] | None] | None" = None  # for each token; None for the first
    embedding: np.ndarray | None = None  # float32 [D], of length 1, where the prompt asked for `pooling`

    @property
    def num_tokens(self) -> int:
        """Of all continuations so far."""
        outputs = self.outputs
        return len(outputs[0].token_ids) if len(outputs) == 1 else sum(len(each.token_ids) for each in outputs)


@dataclass(eq=False)
class Completion:
    """One sequence of a request, as the engine keeps it."""

    number: int  # the scheduler's name for it; no other ever has it
    request: "Request" = field(repr=False)
    index: int  # among its request's
    seed: int
    text: "TextStream" = field(repr=False)
    matcher: "Matcher | None" = field(default=None, kw_only=True)  # of its structured output
    page_names: list[bytes] | None = None  # of its full pages; None: it shares none
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: "list[dict[int, Logprob]] | None" = None
    cumulative_logprob: float | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.request.prompt_token_ids + self.output_token_ids

    def output(self) -> CompletionOutput:
        """What a user sees of it now."""
        return CompletionOutput(
            self.index,
            self.text.text,
            list(self.output_token_ids),
            self.finish_reason,
            self.stop_reason,
            self.cumulative_logprob,
            None if self.logprobs is None else list(self.logprobs),
        )


@dataclass(eq=False)
class Request:
    """A request as the engine keeps it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    bad_words: tuple[tuple[int, ...], ...] = ()  # as tokens
    prompt_logprobs: "list[dict[int, Logprob] | None] | None" = None
    beams: "BeamSearch | None" = None
    matcher: "Matcher | None" = None  # at the beginning of its structured output
    salt: bytes = b""  # its pages are shared with requests of the same salt only
    tenant: str = ""
    pooling: str | None = None  # `pooling.POOLINGS`
    pooled: int = 0  # tokens of the prompt whose hidden states are taken care of
    hidden_sum: np.ndarray | None = None  # float32 [D]
    completions: list[Completion] = field(default_factory=list)
    num_cached_tokens: int = 0

    def output(self) -> RequestOutput:
        """What a user sees of it now."""
        outputs = [completion.output() for completion in self.completions]
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.metrics,
            finished=all(output.finished for output in outputs),
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )


def completion_seed(seed: int, index: int) -> int:
    """The seed of a request's completion: the first has the request's own, each other one that is derived from it."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/completion/{index}".encode(), digest_size=8).digest(), "big")
