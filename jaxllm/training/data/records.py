"""What a record may be, and what is wrong with one that is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import DataError

# The keys by which a kind is known, the most particular first.
KEYS = {
    "preference": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`record` with the keys that jaxllm knows; `columns` says what they are called in the file. Raises DataError."""
    record = dict(record)
    values = {}
    for name, given in columns.items():
        if given not in record:
            raise DataError(f"`columns` says that {name} is called `{given}`, and the record has {_listed(record)}: correct `columns`")
        values[name] = record[given]
    kept = {key: value for key, value in record.items() if key not in columns.values()}
    record = {**kept, **values}
    if "messages" not in record and isinstance(record.get("conversations"), list):
        record["messages"] = [_from_sharegpt(turn, i) for i, turn in enumerate(record.pop("conversations"))]
    return record


def detect_kind(record: Mapping[str, Any]) -> str:
    """The kind of a record by its keys. Raises DataError if it is none."""
    for kind, keys in KEYS.items():
        if all(key in record for key in keys):
            return kind
    known = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in KEYS.items())
    raise DataError(f"the record has {_listed(record)}, which is no kind of record ({known}): rename them with `columns`")


def check_record(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """The record's own keys, in the types that the kind asks for: text, or messages. Raises DataError naming the key."""
    missing = [key for key in KEYS[kind] if key not in record]
    if missing:
        raise DataError(f"a {kind} record needs `{missing[0]}`, and this one has {_listed(record)}: add it, or rename with `columns`")
    if kind == "text":
        return {"text": _text(record["text"], "text")}
    checked: dict[str, Any] = {}
    if kind == "chat":
        checked["messages"] = _messages(record["messages"], "messages")
    else:
        names = {"preference": ("prompt", "chosen", "rejected")}.get(kind, ("prompt", "completion"))
        for name in names:
            if record.get(name) is not None:
                checked[name] = _text_or_messages(record[name], name)
        given = {name: isinstance(value, str) for name, value in checked.items()}
        if len(set(given.values())) > 1:
            is_text = next(name for name in given if given[name])
            is_chat = next(name for name in given if not given[name])
            raise DataError(f"`{is_text}` is text and `{is_chat}` is a list of messages: write both in the same way")
        if len(given) < len(names):
            absent = next(name for name in names if name not in checked)
            if absent != "prompt" or kind != "preference" or any(given.values()):
                raise DataError(f"`{absent}` is missing or null: give it as text or as a list of messages")
            checked["prompt"] = _common_start(checked["chosen"], checked["rejected"])
            for name in ("chosen", "rejected"):
                checked[name] = checked[name][len(checked["prompt"]) :]
        for name in names[1:]:
            if not checked[name]:
                raise DataError(f"`{name}` is empty: there is nothing to learn; remove the record")
    if kind == "kto":
        if record["label"] not in (True, False):
            raise DataError(f"`label` is {record['label']!r}: it must be true (a good completion) or false")
        checked["label"] = bool(record["label"])
    if record.get("tools"):
        checked["tools"] = _parsed(record["tools"], "tools")
        if not isinstance(checked["tools"], list):
            raise DataError(f"`tools` must be a list of JSON schemas, and is a {type(checked['tools']).__name__}")
    return checked


def _listed(record: Mapping[str, Any]) -> str:
    return "the keys " + ", ".join(sorted(map(str, record))) if record else "no keys"


def _from_sharegpt(turn: Any, i: int) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    if turn["from"] not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise DataError(f"conversations[{i}] is from {turn['from']!r}, which is not one of {known}: rename it, or write `messages`")
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}` must be text, and is {'null' if value is None else 'a ' + type(value).__name__}")
    if not value.strip():
        raise DataError(f"`{name}` is empty: there is nothing to learn; remove the record")
    return value


def _text_or_messages(value: Any, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(value, name)
    raise DataError(f"`{name}` must be text or a list of messages, and is a {type(value).__name__}")


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    value = _parsed(value, name)
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"`{name}` must be a list of messages with role and content, and is {kind}")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"`{name}` must be an object with a `role` such as user, and is {message!r:.80}")
    message = {key: value for key, value in message.items() if value is not None}
    if "content" not in message and not message.get("tool_calls"):
        raise DataError(f"`{name}` (role {message['role']}) has no `content`: only a message with tool_calls may leave it out")
    if calls := message.get("tool_calls"):
        # The arguments of a call travel as text in OpenAI's protocol, and templates print them with tojson: as text they would be quoted.
        message["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(_parsed(calls, f"{name}.tool_calls"))]
    return message


def _call(call: Any, name: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"`{name}` must be an object with function.name and function.arguments, and is {call!r:.80}")
    return {**call, "function": {**function, "arguments": _parsed(function.get("arguments", {}), f"{name}.function.arguments")}}


def _parsed(value: Any, name: str) -> Any:
    """Nested values may be written as JSON text: tables of columns have no other way."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"`{name}` is text that is not valid JSON ({error}): write it as JSON") from error


def _common_start(chosen: list, rejected: list) -> list:
    """The messages that both conversations begin with: the prompt, where the record does not part it from the answers."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise DataError("`chosen` and `rejected` begin differently and there is no `prompt`: both must answer the same one")
    return chosen[:count]
