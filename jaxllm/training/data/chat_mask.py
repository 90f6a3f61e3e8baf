"""Which part of a rendered conversation each message is, and which part the model generates.

A template is a program that shows no positions, so they are read off by rendering the conversation's beginnings. For message i, with
R(n) the rendering of the first n messages and G(n) the same ended by the header of an answer, an assistant's own text is what R(all)
has from the end of G(i) on, up to its end-of-turn token. Where a template writes the beginning of a conversation otherwise than that of
a longer one (it drops earlier reasoning, or moves the tools to the last question), there are no such positions, and that is refused:
what would be learned is not what was said. `{% generation %}` blocks in a template say it directly, and are used where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.errors import DataError
from jaxllm.tokenizers import Tokenizer

Span = tuple[int, int]


def message_spans(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], loss_on: Sequence[str], render: Callable[..., str]
) -> tuple[str, list[Span]]:
    """The rendered conversation and the half-open character ranges of it that are learned.

    `render(messages, add_generation_prompt)` is the chat template. Raises DataError as the top of this file says.
    """
    whole = render(messages, False)
    closing = _closing(tokenizer)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on[0] == "last":
        answers = answers[-1:]
    roles = {"assistant"} if loss_on[0] in ("completions", "last") else set(loss_on)
    spans: list[Span] = []
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in roles or (role == "assistant" and i not in answers):
            continue
        last = i == len(messages) - 1
        end = len(whole) if last else _end(whole, render(messages[: i + 1], False), closing, i, role)
        if role == "assistant":
            start = _start(whole, render(messages[:i], True) if i else "", i)
            end = _stop(tokenizer, whole, start, end, closing)
        else:
            start = _end(whole, render(messages[:i], False), closing, i - 1, messages[i - 1]["role"]) if i else 0
        if start > end:
            raise _unstable(i, role, whole[end:], whole[start:])
        spans.append((start, end))
    return whole, spans


def _closing(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Any special token, the longest first."""
    ids = tokenizer.special_token_ids | set(tokenizer.eos_token_ids)
    tokens = sorted((tokenizer.id_to_token[i] for i in ids if tokenizer.id_to_token[i]), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _start(whole: str, prompt: str, i: int) -> int:
    if not whole.startswith(prompt):
        raise _unstable(i, "assistant", *_divergence(whole, prompt))
    return len(prompt)


def _end(whole: str, beginning: str, closing: re.Pattern[str], i: int, role: str) -> int:
    """Where the rendering of a conversation's beginning ends in the whole; what only closes a conversation is not counted."""
    if whole.startswith(beginning):
        return len(beginning)
    end = _common(whole, beginning)
    for text in (whole, beginning):  # two special tokens that begin alike part at their beginning
        for match in closing.finditer(text):
            if match.start() < end < match.end():
                end = match.start()
    if closing.sub("", beginning[end:]).strip():
        raise _unstable(i, role, *_divergence(whole, beginning))
    return end


def _stop(tokenizer: Tokenizer, whole: str, start: int, end: int, closing: re.Pattern[str]) -> int:
    """The end of what is generated: the first end-of-text token among the special tokens and spaces that close the message,
    else the last special token there (what follows, a newline say, is written by the template and never by the model)."""
    closes = []
    for match in closing.finditer(whole, start, end):
        if closes and whole[closes[-1].end() : match.start()].strip():
            closes.clear()
        closes.append(match)
    if not closes or whole[closes[-1].end() : end].strip():
        return end
    ends = {tokenizer.id_to_token[i] for i in tokenizer.eos_token_ids}
    return next((match.end() for match in closes if match.group() in ends), closes[-1].end())


def _common(a: str, b: str) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _divergence(whole: str, beginning: str) -> tuple[str, str]:
    at = max(0, _common(whole, beginning) - 10)
    return beginning[at:], whole[at:]


def _unstable(i: int, role: str, alone: str, inside: str) -> DataError:
    return DataError(
        f"the chat template writes messages[{i}] (role {role}) otherwise when messages follow it ({alone[:40]!r} becomes "
        f"{inside[:40]!r}), so it does not tell which tokens were generated: learn only the final answer with loss_on=last "
        "(where it is not that one), or pass a chat_template with {% generation %} blocks"
    )
