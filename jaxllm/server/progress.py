"""What is new in outputs that hold all there is so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxllm.serving import RequestOutput
from jaxllm.serving.request import CompletionOutput, Logprob


class Delta(NamedTuple):
    """What one continuation has that it did not have before. `offset`: characters of its text before this."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    offset: int
    first: bool
    output: CompletionOutput


class Progress:
    """Of all prompts of a request: what was sent, and what they have used."""

    def __init__(self):
        self._sent: dict[tuple[int, int], tuple[int, int, bool]] = {}  # characters, tokens, whether its end was told
        self._newest: dict[int, RequestOutput] = {}

    def deltas(self, number: int, output: RequestOutput) -> Iterator[Delta]:
        """Of those continuations of prompt `number` that have something to show."""
        self._newest[number] = output
        for each in output.outputs:
            first = (number, each.index) not in self._sent
            text, tokens, ended = self._sent.get((number, each.index), (0, 0, False))
            # Tokens whose text is held back wait for it, unless their log-probabilities are asked for.
            if ended or not (each.finished or len(each.text) > text or (each.logprobs is not None and len(each.token_ids) > tokens)):
                continue
            self._sent[number, each.index] = len(each.text), len(each.token_ids), each.finished
            logprobs = None if each.logprobs is None else each.logprobs[tokens:]
            yield Delta(each.text[text:], each.token_ids[tokens:], logprobs, text, first, each)

    def usage(self) -> dict:
        return usage(list(self._newest.values()))


def usage(outputs: list[RequestOutput]) -> dict:
    """OpenAI's, of finished or unfinished requests."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(output.num_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
