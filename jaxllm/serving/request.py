"""Requests and what comes back. Names follow vLLM's, so that a script moves by changing an import."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Literal

from jaxllm.config import unknown
from jaxllm.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]


def _refuse_unknown_keywords(cls):
    """Makes the constructor refuse a keyword that it does not know with a RequestError that names the nearest one."""
    init, known = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(init)
    def __init__(self, *args, **keywords):
        if strange := [name for name in keywords if name not in known]:
            raise RequestError(f"{cls.__name__}: {unknown(strange[0], known, 'parameter')}")
        init(self, *args, **keywords)

    cls.__init__ = __init__
    return cls


@_refuse_unknown_keywords
@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when they end.

    Attributes:
      max_tokens: tokens to generate at most; None: as many as `max_model_len` leaves.
      temperature: 0 is greedy.
      top_k: choose among the k likeliest tokens; 0 or -1: all.
      top_p: choose among the likeliest tokens whose probabilities sum to at least this (nucleus sampling).
      min_p: leave out tokens less likely than this fraction of the likeliest.
      seed: makes this request's tokens reproducible.
      stop: strings that end the output; they are not part of it.
      stop_token_ids: tokens that end the output, besides the model's own end of sequence.
      ignore_eos: go on after the end of sequence.
      skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        def refuse(name: str, must: str):
            raise RequestError(f"{name} must be {must}, not {getattr(self, name)!r}")

        def number(name: str) -> float:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e38:  # what float32 holds; not NaN
                refuse(name, "a finite number")
            return value

        def whole(name: str, low: int, must: str):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                refuse(name, must)

        if self.max_tokens is not None:
            whole("max_tokens", 1, "a whole number of at least 1")
        if number("temperature") < 0:
            refuse("temperature", "0 (greedy) or above")
        whole("top_k", -1, "a whole number: 0 or -1 for all tokens, or at least 1")
        if not 0 < number("top_p") <= 1:
            refuse("top_p", "above 0 and at most 1")
        if not 0 <= number("min_p") <= 1:
            refuse("min_p", "between 0 and 1")
        if self.seed is not None:
            whole("seed", 0, "a whole number from 0 to 2**64 - 1")
            if self.seed >= 2**64:
                refuse("seed", "a whole number from 0 to 2**64 - 1")
        if not isinstance(self.stop, (str, list, tuple, type(None))):
            refuse("stop", "a string, or a list of strings, none of them empty")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(s, str) and s for s in stop):
            refuse("stop", "a string, or a list of strings, none of them empty")
        ids = self.stop_token_ids
        if ids is not None and (
            not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        ):
            refuse("stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(ids or ()))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false")

    def replace(self, **changes) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


@dataclass
class RequestMetrics:
    """Moments in seconds, by `time.monotonic`; None: not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class CompletionOutput:
    """One generated continuation. Text and tokens are all those so far."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it

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


@dataclass
class Request:
    """A request as the engine keeps it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    page_names: list[bytes] | None = None  # of its full pages; None: it shares none
