"""How a chat's answers are to be read, and what a client is shown of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.chat import ChatRequest, NamedTool
from jaxllm.server.service import Service
from jaxllm.server.tools import PARSERS, Arguments, Call, Content, Event, Parser, Reasoning, Required, Thought
from jaxllm.server.tools.events import joined

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True)
class Reading:
    """Of one request. `tools`: for the chat template; `structured`: what forces a call; `parser`, `thinks`: of the answer."""

    tools: list[dict[str, Any]] | None = None
    structured: dict[str, Any] | None = None
    parser: Callable[[], Parser] | None = None
    thinks: bool = False
    named: bool = False
    parallel: bool = True

    @property
    def marks_are_special(self) -> bool:
        """Whether the text must keep special tokens, which some models mark calls with."""
        return self.parser in (PARSERS["mistral"], PARSERS["llama3_json"])


def plan_reading(service: Service, body: ChatRequest) -> Reading:
    """Raises ApiError."""
    choice, form = body.tool_choice, body.response_format
    is_json = form is not None and form.type != "text"
    thinks = service.thinks
    if not body.tools:
        if choice not in (None, "none") or body.parallel_tool_calls is not None:
            name = "tool_choice" if choice is not None else "parallel_tool_calls"
            raise ApiError(400, f"{name} needs tools", param=name)
        return Reading(thinks=thinks)
    if choice == "none":
        return Reading(thinks=thinks)
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools has two of one name", param="tools")
    plain = [tool.model_dump(exclude_none=True) for tool in body.tools]
    parallel = body.parallel_tool_calls is not False
    if choice in (None, "auto"):
        if service.tool_parser is None:
            message = "this server does not know how the model writes calls of tools: start it with --tool-call-parser"
            raise ApiError(400, message, param="tools")
        return Reading(plain, None, None if is_json else PARSERS[service.tool_parser], thinks, parallel=parallel)
    if is_json or body.structured_outputs is not None:
        message = "tool_choice, response_format and structured_outputs each say what the answer must be: give one"
        raise ApiError(400, message, param="tool_choice")
    schemas = {tool.function.name: tool.function.parameters or {"type": "object", "properties": {}} for tool in body.tools}
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in schemas:
            raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
        return Reading(plain, {"json": schemas[name], "disable_any_whitespace": True}, lambda: Required(name), thinks, named=True)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": _moved(schema, f"items/anyOf/{i}/properties/parameters")},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, (name, schema) in enumerate(schemas.items())
    ]
    most = {} if parallel else {"maxItems": 1}
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1} | most
    return Reading(plain, {"json": schema, "disable_any_whitespace": True}, Required, thinks, parallel=parallel)


def _moved(schema: Any, path: str) -> Any:
    """What a schema must be within another, at `path`: it refers to its own definitions from the root."""
    if isinstance(schema, list):
        return [_moved(each, path) for each in schema]
    if not isinstance(schema, dict):
        return schema
    here = {name: _moved_part(name, value, path) for name, value in schema.items()}
    ref = here.get("$ref")
    return here | {"$ref": f"#/{path}{ref[1:]}"} if isinstance(ref, str) and f"{ref}/".startswith("#/") else here


def _moved_part(keyword: str, value: Any, path: str) -> Any:
    if keyword in ("const", "enum"):
        return value
    if keyword in _NAMED_SCHEMAS and isinstance(value, dict):  # whose keys are names: one of them may be called `const`
        return {name: _moved(each, path) for name, each in value.items()}
    return _moved(value, path)


class Reader:
    """Of one continuation: its text in pieces, as the pieces of a message."""

    def __init__(self, reading: Reading, *, inside_thought: bool = False):
        self._reading = reading
        self._thoughts = Reasoning(inside=inside_thought) if reading.thinks else None
        self._calls = None if reading.parser is None else reading.parser()
        self.called = False

    def feed(self, text: str, *, last: bool = False) -> dict[str, Any]:
        """What is new: `content`, `reasoning_content` and `tool_calls`, as a streamed delta has them."""
        events: list[Event] = [Content(text)] if self._thoughts is None else self._thoughts.feed(text)
        if last and self._thoughts is not None:
            events += self._thoughts.finish()
        if self._calls is not None:
            events = [new for event in events for new in (self._calls.feed(event.text) if isinstance(event, Content) else [event])]
            events += self._calls.finish() if last else []
        delta: dict[str, Any] = {}
        for event in joined(events):
            if isinstance(event, Content):
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, Thought):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
            elif event.index == 0 or self._reading.parallel:
                delta.setdefault("tool_calls", []).append(self._call(event))
        return delta

    def _call(self, event: Call | Arguments) -> dict[str, Any]:
        self.called = True
        if isinstance(event, Arguments):
            return {"index": event.index, "function": {"arguments": event.text}}
        new = {"id": f"call_{uuid4().hex[:24]}", "type": "function"}
        return {"index": event.index, **new, "function": {"name": event.name, "arguments": ""}}

    def finish_reason(self, reason: str | None) -> str | None:
        """`tool_calls` where the model chose to call; after a call that was named, `stop`, as OpenAI has it."""
        return "tool_calls" if reason == "stop" and self.called and not self._reading.named else reason

    def message(self, text: str) -> dict[str, Any]:
        """A whole text at once."""
        delta = self.feed(text, last=True)
        calls: list[dict[str, Any]] = []
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": "function", "function": part["function"]})
            else:
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        message = {"role": "assistant", "content": delta.get("content", None if calls else ""), "refusal": None}
        if "reasoning_content" in delta:
            message["reasoning_content"] = delta["reasoning_content"]
        return message | {"tool_calls": calls} if calls else message
