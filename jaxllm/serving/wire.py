"""Outputs on their way from one process to another: what is new in each, instead of all there is so far at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.serving.request import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput


class CompletionNews(NamedTuple):
    """Of one continuation, which only ever grows: what its text and its tokens have more than before."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    cumulative_logprob: float | None


class OutputNews(NamedTuple):
    outputs: list[CompletionNews]
    metrics: RequestMetrics
    finished: bool
    num_cached_tokens: int
    embedding: np.ndarray | None
    prompt_token_ids: list[int] | None  # if they are not those that were asked for: `truncate_prompt_tokens`
    prompt_logprobs: list[dict[int, Logprob] | None] | None


class OutputWriter:
    """Of one request, on the engine's side."""

    def __init__(self, prompt_token_ids: Sequence[int]):
        self._prompt: Sequence[int] | None = prompt_token_ids
        self._sent: dict[int, tuple[int, int, bool]] = {}  # characters, tokens, whether its end was told

    def news(self, output: RequestOutput) -> OutputNews:
        outputs = [news for each in output.outputs if (news := self._of(each)) is not None]
        ids = logprobs = None
        if self._prompt is not None:  # the first time; all there is to know of a prompt is there before a token is drawn
            ids = None if output.prompt_token_ids == list(self._prompt) else output.prompt_token_ids
            logprobs, self._prompt = output.prompt_logprobs, None
        return OutputNews(outputs, output.metrics, output.finished, output.num_cached_tokens, output.embedding, ids, logprobs)

    def _of(self, each: CompletionOutput) -> CompletionNews | None:
        now, before = (len(each.text), len(each.token_ids), each.finished), self._sent.get(each.index)
        if now == before:
            return None
        self._sent[each.index] = now
        chars, tokens, _ = before or (0, 0, False)
        logprobs = None if each.logprobs is None else each.logprobs[tokens:]
        ends = (each.finish_reason, each.stop_reason, each.cumulative_logprob)
        return CompletionNews(each.index, each.text[chars:], each.token_ids[tokens:], logprobs, *ends)


class OutputReader:
    """Of one request, on the side of who asked: puts together again what `OutputWriter` took apart."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int]):
        self._prompt = (request_id, prompt)
        self._prompt_token_ids, self._prompt_logprobs = list(prompt_token_ids), None
        self._outputs: dict[int, CompletionOutput] = {}

    def output(self, news: OutputNews) -> RequestOutput:
        """All there is so far; it stays as it is when more comes."""
        for each in news.outputs:
            self._outputs[each.index] = _joined(self._outputs.get(each.index), each)
        if news.prompt_token_ids is not None:
            self._prompt_token_ids = news.prompt_token_ids
        if news.prompt_logprobs is not None:
            self._prompt_logprobs = news.prompt_logprobs
        return RequestOutput(
            *self._prompt,
            self._prompt_token_ids,
            [self._outputs[i] for i in sorted(self._outputs)],
            news.metrics,
            news.finished,
            news.num_cached_tokens,
            self._prompt_logprobs,
            news.embedding,
        )


def _joined(before: CompletionOutput | None, news: CompletionNews) -> CompletionOutput:
    text, tokens, logprobs = ("", [], []) if before is None else (before.text, before.token_ids, before.logprobs)
    logprobs = None if news.logprobs is None else logprobs + news.logprobs
    ends = (news.finish_reason, news.stop_reason, news.cumulative_logprob)
    return CompletionOutput(news.index, text + news.text, tokens + news.token_ids, *ends, logprobs)
