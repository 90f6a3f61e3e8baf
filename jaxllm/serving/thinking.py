"""Thoughts before structured output: a grammar that begins when the model has thought (as with vLLM's reasoning parsers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.serving.structured import Matcher

OPENING, CLOSING = "<think>", "</think>"


class ThinkingMatcher(Matcher):
    """Anything may come until `</think>` has; from then on, what the grammar of `matcher` says.

    `inside`: the prompt has opened the thought. Where it has not, the first token is `<think>`, if that is one token (`opening`), or
    the grammar's: a model that does not think is never left without its grammar.
    """

    def __init__(self, matcher: Matcher, decode: Callable[[Sequence[int]], str], opening: int | None, *, inside: bool):
        super().__init__(matcher.matcher)
        self._decode, self._opening = decode, opening
        self._state = "inside" if inside else "before" if opening is not None else "after"
        self._recent: list[int] = []

    def copy(self) -> ThinkingMatcher:
        other = ThinkingMatcher(super().copy(), self._decode, self._opening, inside=True)
        other._state, other._recent = self._state, list(self._recent)
        return other

    def widen(self, mask: np.ndarray) -> None:
        if self._state == "inside":
            mask[:] = np.uint32(0xFFFFFFFF)
        elif self._state == "before":
            mask[self._opening // 32] |= np.uint32(1 << self._opening % 32)

    def take(self, token: int) -> bool:
        if self._state == "inside":
            self._recent = [*self._recent[-16:], token]
            _, closed, rest = self._decode(self._recent).rpartition(CLOSING)
            if closed:
                self._state = "after" if not rest.strip() else "stuck"
            return self._state == "stuck"
        if self._state == "before" and token == self._opening:
            self._state = "inside"
            return False
        self._state = "after"
        return super().take(token)

    @property
    def error(self) -> str | None:
        if self._state == "stuck":
            return f"structured_outputs: a token has both the end of {CLOSING} and text after it, which no grammar was asked about"
        return super().error
