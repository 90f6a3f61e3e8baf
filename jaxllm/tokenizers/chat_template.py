"""Chat templates: Jinja programs that come with a model, run in a sandbox with the environment that transformers gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import uuid4

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.errors import RequestError, TokenizerError
from jaxllm.tokenizers.tool_schema import tool_schema

# Names under which clients send a model's reasoning; templates read one or the other.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_MARKS = "_generation_marks"  # the template variable that holds the two marks of `_Generation`


@dataclass(frozen=True)
class Rendered:
    """The text, and for each `{% generation %}` block the half-open range of its characters, in order."""

    text: str
    generation_spans: tuple[tuple[int, int], ...] = ()


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any] | Callable] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    mark_generation: bool,
    variables: Mapping[str, Any],
) -> Rendered:
    """Runs `template`; the arguments are those of `Tokenizer.apply_chat_template`."""
    compiled = _compile(template)
    chat = _check_messages(messages)
    context = {name: _plain(value, name) for name, value in variables.items()}
    if tools is not None:
        tools = [_plain(tool_schema(tool, i), f"tools[{i}]") for i, tool in enumerate(_list(tools, "tools"))]
    if documents is not None:
        documents = _check_documents(documents)
    tail = None
    if continue_final_message:
        if add_generation_prompt or mark_generation:
            clash = "add_generation_prompt" if add_generation_prompt else "return_assistant_mask"
            raise RequestError(f"continue_final_message=True cannot be combined with {clash}=True: set one of them to False.")
        tail = _mark_tail(chat)
    # Marks that no message can contain stand in the text until the blocks' positions are read off and they are taken out again.
    marks = (f"<{uuid4().hex}>", f"<{uuid4().hex}>") if mark_generation else None
    if marks and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise TokenizerError(
            "return_assistant_mask needs a chat template with {% generation %} ... {% endgeneration %} around what the assistant says, "
            "and this one has none: pass such a template as chat_template."
        )
    try:
        text = compiled.render(
            messages=chat,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**context, _MARKS: marks},
        )
    except Exception as error:  # a template is somebody else's program: whatever it raises means that it cannot render this
        raise TokenizerError(f"The chat template refused this conversation: {error or type(error).__name__}") from error
    if tail is not None:
        text = _cut_at(text, tail)
    return _read_marks(text, marks) if marks else Rendered(text)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"The chat template is not valid Jinja: {error.message} (line {error.lineno}).") from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant said. Adds marks around it where the context has some."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        marks = context.get(_MARKS)
        return caller() if not marks else marks[0] + caller() + marks[1]


def _read_marks(text: str, marks: tuple[str, str]) -> Rendered:
    pieces, spans, length = [], [], 0
    head, *blocks = text.split(marks[0])
    pieces.append(head)
    length += len(head)
    for block in blocks:
        inside, _, after = block.partition(marks[1])
        spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return Rendered("".join(pieces), tuple(spans))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _list(value: object, name: str) -> list:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} must be a list, but it is a {type(value).__name__}.")
    return list(value)


def _check_messages(messages: object) -> list[dict[str, Any]]:
    """A copy of the messages in plain JSON types, without keys that are None (clients send them; templates print "None")."""
    chat = []
    for i, message in enumerate(_list(messages, "messages")):
        message = _plain(message, f"messages[{i}]")
        if not isinstance(message, dict):
            raise RequestError(f"messages[{i}] must be a dict with 'role' and 'content', but it is a {type(message).__name__}.")
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{i}] needs a 'role' that is a string, such as 'user'; it has {message.get('role')!r}.")
        if "content" not in message and not message.get("tool_calls"):
            raise RequestError(f"messages[{i}] (role {message['role']!r}) has no 'content'; only a message with 'tool_calls' may omit it.")
        if not isinstance(message.get("content", ""), str | list):
            kind = type(message["content"]).__name__
            raise RequestError(f"messages[{i}]['content'] must be a string or a list of parts, but it is a {kind}.")
        reasoning = next((message[key] for key in _REASONING_KEYS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        chat.append(message)
    if not chat:
        raise RequestError("messages is empty: give at least one message.")
    return chat


def _check_documents(documents: object) -> list[dict[str, Any]]:
    plain = [_plain(document, f"documents[{i}]") for i, document in enumerate(_list(documents, "documents"))]
    for i, document in enumerate(plain):
        if not isinstance(document, dict):
            raise RequestError(f"documents[{i}] must be a dict, such as one with 'title' and 'text', not a {type(document).__name__}.")
    return plain


def _plain(value: Any, where: str) -> Any:
    """A deep copy in plain JSON types: other objects have methods that the sandbox does not know to be dangerous."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if callable(getattr(value, "model_dump", None)):  # a pydantic model, such as a request of the OpenAI client
        return _plain(value.model_dump(), where)
    raise RequestError(f"{where} is a {type(value).__name__}; chat templates take only strings, numbers, booleans, None, lists and dicts.")


def _mark_tail(chat: list[dict[str, Any]]) -> str:
    """Puts a mark at the end of the last message's text. The space at its end shows whether the template trims the text."""
    mark = f"{uuid4().hex} "
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + mark
        return mark
    for part in reversed(content or []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += mark
            return mark
    raise RequestError(f"continue_final_message=True, but messages[{len(chat) - 1}] has no text in its 'content' to continue.")


def _cut_at(text: str, mark: str) -> str:
    bare = mark.strip()
    if bare not in text:
        raise TokenizerError("continue_final_message=True, but the chat template leaves the end of the last message out of its text.")
    end = text.rindex(bare)
    return text[:end] if text.startswith(mark, end) else text[:end].rstrip()
