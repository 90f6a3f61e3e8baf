"""From the items of /v1/responses to a chat's messages."""

from __future__ import annotations

from typing import Any

from jaxllm.server.body import check
from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.base import Body
from jaxllm.server.protocol.chat import ChatRequest
from jaxllm.server.protocol.responses import (
    INPUT_ITEMS,
    CallItem,
    CallOutputItem,
    FunctionTool,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
)


def read_items(given: str | list[dict[str, Any]], *, warn: bool) -> list[dict[str, Any]]:
    """Messages. What a model said in one turn (its thoughts, its text, its calls) is one message. `warn`: see
    `body.check`. Raises ApiError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise ApiError(400, "input has nothing in it: give a text, or a list of items", param="input")
    messages: list[dict[str, Any]] = []
    for i, tree in enumerate(given):
        add_item(messages, _checked(tree, INPUT_ITEMS, f"input[{i}]", default="message", warn=warn))
    return messages


def add_item(messages: list[dict[str, Any]], item: Body) -> None:
    if isinstance(item, CallOutputItem):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return
    if isinstance(item, MessageItem) and item.role != "assistant":
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text(item.content)})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if isinstance(item, ReasoningItem):
        said = {"reasoning_content": "\n".join(part.text for part in item.content or item.summary)}
        fits = False  # thoughts begin a turn
    elif isinstance(item, CallItem):
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        said, fits = {"tool_calls": [*(last or {}).get("tool_calls", ()), call]}, True
    else:
        said, fits = {"content": _text(item.content)}, last is not None and not {"content", "tool_calls"} & set(last)
    if last is not None and fits:
        last |= said
    else:
        messages.append({"role": "assistant"} | said)


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _checked(tree: dict[str, Any], kinds: dict[str, type[Body]], where: str, *, warn: bool, default: str | None = None) -> Any:
    kind = tree.get("type", default)
    if not isinstance(kind, str) or kind not in kinds:
        message = f"{where}.type: {kind!r:.100} is not implemented here: {' or '.join(kinds)}"
        raise ApiError(400, message, param=f"{where}.type", code="invalid_value")
    try:
        return check(tree, kinds[kind], warn=warn)
    except ApiError as error:
        param = f"{where}.{error.param}" if error.param else where
        raise ApiError(400, f"{where}: {error.message}", param=param, code=error.code) from None


def as_chat(body: ResponsesRequest, messages: list[dict[str, Any]], *, warn: bool) -> ChatRequest:
    """Raises ApiError for what is wrong with it as a chat, too."""
    first = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    same = ("model", "temperature", "top_p", "top_k", "seed", "parallel_tool_calls", "cache_salt", "chat_template_kwargs", "user")
    tree: dict[str, Any] = {"messages": first + messages, "stream": True, "stream_options": {"include_usage": True}}
    tree |= {name: getattr(body, name) for name in same} | {"max_completion_tokens": body.max_output_tokens}
    if body.top_logprobs is not None and not body.include:
        raise ApiError(400, "top_logprobs needs include=['message.output_text.logprobs']", param="top_logprobs")
    if body.include:
        tree |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.tools:
        tools = [_checked(tool, {"function": FunctionTool}, f"tools[{i}]", warn=warn) for i, tool in enumerate(body.tools)]
        tree["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in tools]
    choice = body.tool_choice
    tree["tool_choice"] = choice if choice is None or isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
    if body.text is not None and body.text.format is not None:
        form = body.text.format
        if (form.type == "json_schema") != (form.json_schema is not None):
            raise ApiError(400, "text.format.schema must be there with type json_schema, and only then", param="text.format.schema")
        schema = {"name": form.name or "answer", "schema": form.json_schema, "strict": form.strict}
        tree["response_format"] = {"type": form.type} | ({} if form.json_schema is None else {"json_schema": schema})
    return check(tree, ChatRequest)
