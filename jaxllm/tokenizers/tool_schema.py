"""Tools for chat templates: a Python function's type hints and Google docstring as the JSON schema that models are trained on."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxllm.errors import RequestError

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_PLAIN_TYPES = {
    **{kind: {"type": name} for kind, name in _JSON_TYPES.items()},
    **{list: {"type": "array"}, tuple: {"type": "array"}, dict: {"type": "object"}, Any: {}},
}
_SECTION = re.compile(r"^\s*(Args|Returns|Raises):[ \t]*", re.MULTILINE)
_ARGUMENT = re.compile(r"^([ \t]*)(\w+):[ \t]*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE | re.DOTALL)


def tool_schema(tool: Mapping[str, Any] | Callable, position: int = 0) -> dict[str, Any]:
    """`tool` itself if it is a schema already, else that of a function.

    Raises RequestError naming the tool, by its place in the list or its name, and what to add to it.
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return function_schema(tool)
    raise RequestError(f"tools[{position}] must be a JSON schema (a dict) or a Python function, but it is a {type(tool).__name__}.")


def function_schema(function: Callable) -> dict[str, Any]:
    """The schema of a function with type hints and a docstring that describes it and, under "Args:", each argument.

    A description may end in `(choices: ["a", "b"])`, which becomes an enum.
    """
    name = function.__name__
    doc = inspect.getdoc(function)
    if not doc:
        raise RequestError(f"Tool {name} has no docstring: describe it and its arguments in Google style, or pass a JSON schema.")
    description, arguments, returns = _parse_docstring(doc)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for i, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if argument not in hints:
            if i == 0 and argument in ("self", "cls"):
                continue
            raise RequestError(f"Argument {argument!r} of tool {name} has no type hint: add one, or pass a JSON schema.")
        if argument not in arguments:
            raise RequestError(f"Argument {argument!r} of tool {name} is not described under 'Args:' in its docstring: add a line for it.")
        schema, text = _type_schema(hints[argument], f"argument {argument!r} of tool {name}"), arguments[argument]
        if choices := _CHOICES.search(text):
            schema["enum"], text = _parse_choices(choices[1], argument, name), text[: choices.start()].strip()
        properties[argument] = {**schema, "description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    schema = {"name": name, "description": description, "parameters": parameters}
    if "return" in hints:
        try:
            result = _type_schema(hints["return"], f"the result of tool {name}")
        except RequestError:
            pass  # the model never writes the result, so one that JSON cannot describe is left out rather than refused
        else:
            schema["return"] = result | ({"description": returns} if returns is not None else {})
    return {"type": "function", "function": schema}


def _parse_choices(text: str, argument: str, name: str) -> list:
    try:
        return [choice.strip() if isinstance(choice, str) else choice for choice in json.loads(text)]
    except (ValueError, TypeError):
        raise RequestError(f"The choices of argument {argument!r} of tool {name} must be a JSON list, not {text!r}.") from None


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(description, description of each argument, description of the result or None) of a Google-style docstring."""
    head, *rest = _SECTION.split(doc.strip())
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    arguments: dict[str, list[str]] = {}
    lines: list[str] = []
    outermost = None
    for line in sections.get("Args", "").splitlines():
        match = _ARGUMENT.match(line)
        # A deeper "word:" is part of the description above it.
        if match and (outermost is None or len(match[1].expandtabs()) <= outermost):
            outermost = len(match[1].expandtabs())
            lines = arguments.setdefault(match[2], [])
            line = match[3]
        if line.strip():
            lines.append(line.strip())
    returns = sections.get("Returns")
    return head.strip(), {name: " ".join(text) for name, text in arguments.items()}, None if returns is None else returns.strip()


def _enum_schema(values: list, where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _JSON_TYPES for value in values):
        raise RequestError(f"The choices {values} for {where} must be one or more of int, float, str, bool and None.")
    kinds = list(dict.fromkeys(_JSON_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union_schema(arguments: tuple, where: str) -> dict[str, Any]:
    members = [_type_schema(member, where) for member in arguments if member is not type(None)]
    if len(members) == 1:
        schema = members[0]
    elif all(member.keys() == {"type"} and isinstance(member["type"], str) for member in members):
        names = sorted({member["type"] for member in members})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": members}
    return schema | ({"nullable": True} if type(None) in arguments else {})


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, Enum):
            return _enum_schema([member.value for member in hint], where)
        try:
            return dict(_PLAIN_TYPES[hint])
        except (KeyError, TypeError):
            pass
    elif origin in (Union, types.UnionType):
        return _union_schema(arguments, where)
    elif origin is Literal:
        return _enum_schema(list(arguments), where)
    elif origin is list:
        return {"type": "array", "items": _type_schema(arguments[0], where)}
    elif origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_type_schema(member, where) for member in arguments]}
    elif origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    raise RequestError(
        f"The type hint {hint!r} for {where} has no JSON schema. Use int, float, str, bool, an Enum, Literal, list, dict, a tuple of "
        "fixed length, or a union of them; or pass the schema itself instead of the function."
    )
