"""`<think>...</think>` before the answer."""

from __future__ import annotations

from jaxllm.server.tools.events import Content, Event, Tag, Thought


class Reasoning:
    """`inside`: the prompt has said `<think>` already. Blank lines around thoughts are no part of anything."""

    def __init__(self, *, inside: bool = False):
        self._opening, self._closing = Tag("<think>"), Tag("</think>")
        self._state = "inside" if inside else "before"
        self._told = False  # any thought
        self._held = ""  # white space that may be the last of the thoughts

    def feed(self, text: str) -> list[Event]:
        if self._state == "before":
            before, after = self._opening.feed(text)
            if after is None and not (before + self._held).strip():
                self._held += before  # nothing but white space so far
                return []
            if after is None or before.strip():  # it says something else first
                self._state = "after"
                rest = "" if after is None else self._opening.tag + after
                return [Content(self._held + before + self._opening.finish() + rest)]
            self._state, self._held, text = "inside", "", after
        if self._state == "inside":
            before, after = self._closing.feed(text)
            thought = self._held + before if self._told else (self._held + before).lstrip()
            self._told = self._told or bool(thought)
            if after is None:
                self._held = thought[len(thought.rstrip()) :]
                return [Thought(thought.rstrip())]
            self._state, self._held = "gap", ""
            return [Thought(thought.rstrip()), *self.feed(after)]
        if self._state == "gap":
            text = text.lstrip("\n")
            self._state = "after" if text else "gap"
        return [Content(text)]

    def finish(self) -> list[Event]:
        if self._state == "before":
            return [Content(self._held + self._opening.finish())]
        return [Thought(self._held + self._closing.finish())] if self._state == "inside" else []
