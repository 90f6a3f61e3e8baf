"""Outputs on their way from one process to another: what is new in each, instead of all there is so far at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxllm.serving.request import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput


class CompletionNews(NamedTuple):
    """Of one continuation: its text after the first `chars` characters, and its tokens after the first `tokens`."""

    index: int
    chars: int
    text: str
    tokens: int
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
    """Of one request, on the engine's side. `rewrites`: its continuations may lose what they had (beams), and are sent whole."""

    def __init__(self, prompt_token_ids: Sequence[int], rewrites: bool):
        self._prompt, self._rewrites = prompt_token_ids, rewrites
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
        if not self._rewrites:
            self._sent[each.index] = now
        chars, tokens, _ = before or (0, 0, False)
        logprobs = None if each.logprobs is None else each.logprobs[tokens:]
        ends = (each.finish_reason, each.stop_reason, each.cumulative_logprob)
        return CompletionNews(each.index, chars, each.text[chars:], tokens, each.token_ids[tokens:], logprobs, *ends)


class OutputReader:
    """Of one request, on the side of who asked: puts together again what `OutputWriter` took apart."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], rewrites: bool):
        self._newest = RequestOutput(request_id, prompt, list(prompt_token_ids), [], RequestMetrics(0.0))
        self._rewrites = rewrites

    def output(self, news: OutputNews) -> RequestOutput:
        """All there is so far; it stays as it is when more comes."""
        outputs = {} if self._rewrites else {each.index: each for each in self._newest.outputs}
        for each in news.outputs:
            outputs[each.index] = _joined(outputs.get(each.index), each)
        changes: dict[str, Any] = news._asdict() | {"outputs": [outputs[i] for i in sorted(outputs)]}
        told_once = {name for name in ("prompt_token_ids", "prompt_logprobs") if changes[name] is None}
        self._newest = replace(self._newest, **{name: value for name, value in changes.items() if name not in told_once})
        return self._newest


def _joined(before: CompletionOutput | None, news: CompletionNews) -> CompletionOutput:
    text, tokens, logprobs = ("", [], None) if before is None else (before.text, before.token_ids, before.logprobs)
    return CompletionOutput(
        news.index,
        text[: news.chars] + news.text,
        tokens[: news.tokens] + news.token_ids,
        news.finish_reason,
        news.stop_reason,
        news.cumulative_logprob,
        None if news.logprobs is None else (logprobs or [])[: news.tokens] + news.logprobs,
    )
