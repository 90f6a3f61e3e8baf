"""Outputs on their way from one process to another: what is new in each, instead of all there is so far at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.serving.request import CompletionOutput, RequestMetrics, RequestOutput

# Every token travels in these, so they are plain tuples: to pickle a named one costs several times as much.
#
# Of one continuation, which only ever grows, what its text and its tokens have more than before:
#   (index, text, token_ids, finish_reason, stop_reason, cumulative_logprob, logprobs)
CompletionNews = tuple[Any, ...]
# Of a request:
#   (its continuations that have news, its metrics' fields in their order, finished, num_cached_tokens, what is rare or None)
# What is rare:
#   (embedding, prompt_token_ids if they are not those that were asked for (`truncate_prompt_tokens`), prompt_logprobs)
OutputNews = tuple[Any, ...]


class OutputWriter:
    """Of one request, on the engine's side."""

    def __init__(self, prompt_token_ids: Sequence[int]):
        self._prompt: Sequence[int] | None = prompt_token_ids
        self._sent: dict[int, tuple[int, int, bool]] = {}  # characters, tokens, whether its end was told

    def news(self, output: RequestOutput) -> OutputNews:
        outputs = [news for each in output.outputs if (news := self._of(each)) is not None]
        ids = logprobs = rare = None
        if self._prompt is not None:  # the first time; all there is to know of a prompt is there before a token is drawn
            ids = None if output.prompt_token_ids == list(self._prompt) else output.prompt_token_ids
            logprobs, self._prompt = output.prompt_logprobs, None
        if output.embedding is not None or ids is not None or logprobs is not None:
            rare = (output.embedding, ids, logprobs)
        times = output.metrics
        moments = (times.arrival_time, times.scheduled_time, times.first_token_time, times.last_token_time, times.finished_time)
        return outputs, moments, output.finished, output.num_cached_tokens, rare

    def _of(self, each: CompletionOutput) -> CompletionNews | None:
        now, before = (len(each.text), len(each.token_ids), each.finished), self._sent.get(each.index)
        if now == before:
            return None
        self._sent[each.index] = now
        chars, tokens, _ = before or (0, 0, False)
        logprobs = None if each.logprobs is None else each.logprobs[tokens:]
        ends = (each.finish_reason, each.stop_reason, each.cumulative_logprob)
        return each.index, each.text[chars:], each.token_ids[tokens:], *ends, logprobs


class OutputReader:
    """Of one request, on the side of who asked: puts together again what `OutputWriter` took apart."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int]):
        self._prompt = (request_id, prompt)
        self._prompt_token_ids, self._prompt_logprobs = list(prompt_token_ids), None
        self._outputs: dict[int, CompletionOutput] = {}

    def output(self, news: OutputNews) -> RequestOutput:
        """All there is so far; it stays as it is when more comes."""
        outputs, moments, finished, num_cached_tokens, rare = news
        for each in outputs:
            self._outputs[each[0]] = _joined(self._outputs.get(each[0]), each)
        embedding = None
        if rare is not None:
            embedding, ids, logprobs = rare
            self._prompt_token_ids = self._prompt_token_ids if ids is None else ids
            self._prompt_logprobs = self._prompt_logprobs if logprobs is None else logprobs
        all_outputs = [self._outputs[i] for i in sorted(self._outputs)] if len(self._outputs) > 1 else list(self._outputs.values())
        told = (RequestMetrics(*moments), finished, num_cached_tokens, self._prompt_logprobs, embedding)
        return RequestOutput(*self._prompt, self._prompt_token_ids, all_outputs, *told)


def _joined(before: CompletionOutput | None, news: CompletionNews) -> CompletionOutput:
    index, new_text, new_tokens, *ends, new_logprobs = news
    if before is None:
        return CompletionOutput(index, new_text, new_tokens, *ends, new_logprobs)
    logprobs = None if new_logprobs is None else before.logprobs + new_logprobs
    return CompletionOutput(index, before.text + new_text, before.token_ids + new_tokens, *ends, logprobs)
