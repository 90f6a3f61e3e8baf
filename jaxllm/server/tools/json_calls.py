"""Calls written as JSON: `{"name": ..., "arguments": {...}}`, between the marks that each family puts around them."""

from __future__ import annotations

import json

from jaxllm.server.tools.events import Arguments, Call, Content, Event, Tag

_ARGUMENTS = ("arguments", "parameters")


class CallReader:
    """One JSON object, of which the name is told as soon as it is known and the arguments as they come."""

    def __init__(self, index: int):
        self.index, self.text, self.done, self.called = index, "", False, False
        self._depth, self._string, self._escaped = 0, False, False
        self._key: str | None = None  # of the value that is being read, at the object's own level
        self._part = ""  # the key or value that is being read
        self._pending = ""  # arguments that came before the name

    def feed(self, char: str) -> list[Event]:
        self.text += char
        outer = self._depth == 1 and not self._string
        if self._string:
            self._string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth == 0:
            self.done = True
        elif self._depth == 1 and len(self.text) == 1:
            return []
        elif outer and char == ":" and self._key is None:
            self._key, self._part = _text(self._part), ""
            return []
        if outer and (char == "," or self.done):
            return self._end_of_value()
        self._part += char
        if self._key in _ARGUMENTS and not self._part.lstrip().startswith('"'):  # in quotes, they are unpacked at their end
            return self._tell(self._part.lstrip() if not self._part[:-1].strip() else char)
        return []

    def _end_of_value(self) -> list[Event]:
        key, value, self._key, self._part = self._key, self._part.strip(), None, ""
        if key == "name" and not self.called:
            self.called = True
            pending, self._pending = self._pending, ""
            return [Call(self.index, str(_text(value))), Arguments(self.index, pending)]
        if key in _ARGUMENTS and value.startswith('"'):
            return self._tell(str(_text(value)))
        return []

    def _tell(self, text: str) -> list[Event]:
        if self.called:
            return [Arguments(self.index, text)]
        self._pending += text
        return []


def _text(value: str) -> str:
    try:
        return json.loads(value)
    except ValueError:
        return value.strip().strip('"')


class _Objects:
    """Calls in a row; whatever is between them is dropped."""

    def __init__(self):
        self.count, self.reader = 0, None

    def feed(self, char: str) -> list[Event]:
        if self.reader is None:
            if char != "{":
                return []
            self.reader = CallReader(self.count)
            self.count += 1
        events = self.reader.feed(char)
        if self.reader.done:
            if not self.reader.called:  # an object, but no call
                events, self.count = [Content(self.reader.text)], self.count - 1
            self.reader = None
        return events

    def finish(self) -> list[Event]:
        """Of a call that was cut short before it had a name, its text."""
        return [Content(self.reader.text)] if self.reader is not None and not self.reader.called else []


class Hermes:
    """Hermes 2 and 3, Qwen 2.5 and 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as often as need be."""

    def __init__(self):
        self._opening, self._closing = Tag("<tool_call>"), Tag("</tool_call>")
        self._inside, self._objects, self._blank = False, _Objects(), ""

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest: str | None = text
        while rest is not None:
            if self._inside:
                before, rest = self._closing.feed(rest)
                for char in before:
                    events += self._objects.feed(char)
                self._inside = rest is None
            else:
                before, rest = self._opening.feed(rest)
                self._inside = rest is not None
                events += self._say(before)
                if self._inside:
                    self._blank = ""
        return events

    def _say(self, text: str) -> list[Event]:
        """White space is told only when more text follows: between calls there is none."""
        text = self._blank + text
        said = text.rstrip() if not self._objects.count else text.strip()
        self._blank = text[len(text.rstrip()) :] if not self._objects.count else ""
        return [Content(said)]

    def finish(self) -> list[Event]:
        if self._inside:
            return self._objects.finish()
        return [Content(self._blank + self._opening.finish())] if not self._objects.count else []


class Llama3:
    """Llama 3.1 to 3.3: the whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between, maybe after
    `<|python_tag|>`."""

    _MARK = "<|python_tag|>"

    def __init__(self):
        self._held, self._state, self._objects = "", "unknown", _Objects()

    def feed(self, text: str) -> list[Event]:
        if self._state == "unknown":
            self._held += text
            begun = self._held.lstrip()
            if not begun or self._MARK.startswith(begun):
                return []
            self._state = "calls" if begun.startswith(("{", self._MARK)) else "text"
            text, self._held = self._held, ""
        if self._state == "text":
            return [Content(text)]
        return [event for char in text for event in self._objects.feed(char)]

    def finish(self) -> list[Event]:
        return [Content(self._held)] if self._state == "unknown" else self._objects.finish()


class Mistral:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and from version 11 of its tokenizer on `[TOOL_CALLS]name{...}`."""

    def __init__(self):
        self._mark, self._inside, self._form = Tag("[TOOL_CALLS]"), False, None
        self._objects, self._count, self._name, self._depth = _Objects(), 0, "", 0
        self._string = self._escaped = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        rest: str | None = text
        while rest is not None:
            before, rest = self._mark.feed(rest)
            if self._inside:
                for char in before:
                    events += self._read(char)
            else:
                events.append(Content(before))
            if rest is not None:
                self._inside, self._form, self._name = True, None, ""
        return events

    def _read(self, char: str) -> list[Event]:
        if self._form is None and char.strip():
            self._form = "list" if char in "[{" else "name"
        if self._form == "list":
            return self._objects.feed(char)
        if self._depth == 0 and char != "{":
            self._name += char
            return []
        events: list[Event] = []
        if self._depth == 0:
            events.append(Call(self._count, self._name.strip().removesuffix("[ARGS]")))
            self._name, self._count = "", self._count + 1
        if self._string:
            self._string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        else:
            self._string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
        return [*events, Arguments(self._count - 1, char)]

    def finish(self) -> list[Event]:
        if not self._inside:
            return [Content(self._mark.finish())]
        return self._objects.finish()


class Required:
    """What `tool_choice` required has the model write: a list of `{"name": ..., "parameters": {...}}`; or, of one that is named,
    its arguments alone."""

    def __init__(self, name: str | None = None):
        self._name, self._begun, self._objects = name, False, _Objects()

    def feed(self, text: str) -> list[Event]:
        if self._name is None:
            return [event for char in text for event in self._objects.feed(char)]
        first = [] if self._begun else [Call(0, self._name)]
        self._begun = True
        return [*first, Arguments(0, text)]

    def finish(self) -> list[Event]:
        return self._objects.finish()
