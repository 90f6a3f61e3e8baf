"""Calls written as Python: `[get_weather(city="Bern", days=3), ...]`, as Llama 3.2 and 4, Gemma 3 and others are asked for."""

from __future__ import annotations

import ast
import json

from jaxllm.server.tools.events import Arguments, Call, Content, Event


class Pythonic:
    """The whole answer is a list of calls with keyword arguments of literals, maybe in a code block; else it is text. A call is
    told when all are there: Python cannot be read half."""

    def __init__(self):
        self._text, self._is_text = "", False

    def feed(self, text: str) -> list[Event]:
        if self._is_text:
            return [Content(text)]
        self._text += text
        begun = self._text.lstrip()
        if begun and not any(begun.startswith(mark) or mark.startswith(begun) for mark in ("[", "```")):
            self._is_text = True
            return [Content(self._text)]
        return []

    def finish(self) -> list[Event]:
        if self._is_text:
            return []
        calls = _calls(self._text)
        if calls is None:
            return [Content(self._text)]
        pairs = [(Call(i, name), Arguments(i, json.dumps(arguments, ensure_ascii=False))) for i, (name, arguments) in enumerate(calls)]
        return [event for pair in pairs for event in pair]


def _calls(text: str) -> list[tuple[str, dict]] | None:
    """(name, arguments) of each call; None if the text is anything else."""
    text = text.strip().removesuffix("```").strip()
    for mark in ("```tool_code", "```python", "```"):
        text = text.removeprefix(mark).strip()
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else None
        if not calls or not all(isinstance(call, ast.Call) and not call.args for call in calls):
            return None
        found = [(ast.unparse(call.func), {each.arg: ast.literal_eval(each.value) for each in call.keywords}) for call in calls]
        return None if any(None in arguments for _, arguments in found) or not json.dumps([a for _, a in found]) else found
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
