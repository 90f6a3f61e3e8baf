"""A record to tokens, and to which of them are learned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.errors import DataError, RequestError, TokenizerError
from jaxllm.tokenizers import Tokenizer
from jaxllm.training.data.chat_mask import message_spans
from jaxllm.training.data.config import DataConfig
from jaxllm.training.data.records import check_record

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Sequence:
    """Tokens `[n]` int32, and `[n]` bool: whether the loss counts the prediction of each."""

    ids: np.ndarray
    loss: np.ndarray


@dataclass
class Example:
    """One sequence (its `label` for kto), or two: the chosen and the rejected."""

    sequences: tuple[Sequence, ...]
    label: bool = False


class Encoder:
    """Makes examples of checked records. Raises DataError without the place, which the caller knows."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig):
        self.tokenizer = tokenizer
        self.config = config

    def __call__(self, record: dict[str, Any], kind: str) -> Example:
        record = check_record(record, kind)
        try:
            if kind == "text":
                return Example((self._plain("", record["text"]),))
            if kind == "chat":
                return Example((self._chat(record["messages"], record.get("tools")),))
            if kind == "preference":
                return Example(tuple(self._answer(record, name) for name in ("chosen", "rejected")))
            return Example((self._answer(record, "completion"),), record.get("label", False))
        except (RequestError, TokenizerError) as error:
            raise DataError(str(error)) from error

    def _answer(self, record: dict[str, Any], name: str) -> Sequence:
        if isinstance(record[name], str):
            return self._plain(record["prompt"], record[name])
        return self._chat(record["prompt"] + record[name], record.get("tools"), after=record["prompt"])

    def _plain(self, prompt: str, completion: str) -> Sequence:
        """Text as it stands. The prompt and the completion are tokenised together, as a served conversation would be; a token that
        holds the end of one and the beginning of the other is learned."""
        everything = not prompt or self.config.loss_on[0] == "all"
        learned = (0 if everything else len(prompt), len(prompt) + len(completion))
        ids, loss = self.tokenizer.encode_with_mask(prompt + completion, [learned], add_special_tokens=True)
        if everything:
            loss = [1] * len(ids)  # with what the tokenizer puts before the text
        if prompt and self.config.loss_on[0] not in ("completions", "last", "all"):
            raise DataError(f"loss_on={list(self.config.loss_on)} names roles, and a prompt as text has none: use completions or all")
        if self.config.append_eos:
            if self.tokenizer.eos_token_id is None:
                raise DataError("append_eos needs a tokenizer with an end-of-text token, and this one has none: set append_eos to false")
            if ids[-1:] == [self.tokenizer.eos_token_id]:
                loss[-1] = 1
            else:
                ids.append(self.tokenizer.eos_token_id)
                loss.append(1)
        return _sequence(ids, loss)

    def _chat(self, messages: list[dict[str, Any]], tools: list | None, after: list[dict[str, Any]] | None = None) -> Sequence:
        """`after`: the messages that only ask (the prompt of a pair): nothing in them is learned, whoever speaks."""
        options = {"tools": tools, "chat_template": self.config.chat_template, **self.config.template_options}
        tokenizer, loss_on = self.tokenizer, self.config.loss_on

        def render(some, add_generation_prompt: bool) -> str:
            return tokenizer.apply_chat_template(some, add_generation_prompt=add_generation_prompt, tokenize=False, **options)

        if loss_on[0] == "all" and after is None:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **options)
            return _sequence(ids, [1] * len(ids))
        template = tokenizer._choose_template(self.config.chat_template, tools)
        if after is None and loss_on[0] in ("completions", "last") and _GENERATION.search(template):
            ids, mask = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_assistant_mask=True, **options)
            if loss_on[0] == "last" and 1 in mask:
                end = len(mask) - mask[::-1].index(1)
                start = end - [*mask[:end][::-1], 0].index(0)
                mask = [int(start <= i < end) for i in range(len(mask))]
            return _sequence(ids, mask)
        if after is None:
            text, spans = message_spans(tokenizer, messages, loss_on, render)
        else:
            roles = loss_on if loss_on[0] not in ("last", "all") else ("completions",)
            text, spans = message_spans(tokenizer, messages, ("last",) if len(messages) == len(after) + 1 else roles, render)
            before = len(render(after, True))
            spans = [(start, end) for start, end in spans if start >= before]
        return _sequence(*tokenizer.encode_with_mask(text, spans))


def _sequence(ids: list[int], loss: Any) -> Sequence:
    return Sequence(np.asarray(ids, np.int32), np.asarray(loss, bool))
