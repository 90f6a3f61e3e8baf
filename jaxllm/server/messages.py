"""/v1/messages and /v1/messages/count_tokens: Anthropic's form of a chat, turned into ours and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server import chat
from jaxllm.server.body import check, read_body
from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.protocol.chat import ChatRequest
from jaxllm.server.protocol.messages import CountRequest, MessagesRequest, TextBlock, ToolResultBlock, ToolUseBlock, Turn
from jaxllm.server.streaming import Lines, event, json_response, stream_response, until_gone

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_LINES = Lines(lambda tree: event(tree, tree["type"]), lambda error: event(as_api_error(error).body("/v1/messages"), "error"), b"")


async def messages(request: Request) -> Response:
    body = await read_body(request, MessagesRequest)
    job = await chat.prepare(request.app.state.server, _as_chat(body))
    if body.stream:
        return await stream_response(request, _events(job), _LINES)
    return json_response(_message(job, await until_gone(request.receive, job.answer())))


async def count_tokens(request: Request) -> Response:
    body = await read_body(request, CountRequest)
    job = await chat.prepare(request.app.state.server, _as_chat(body))
    return json_response({"input_tokens": len(job.prompt["prompt_token_ids"])})


def _as_chat(body: CountRequest) -> ChatRequest:
    """Raises ApiError for what is wrong with it as a chat, too."""
    system = [] if body.system is None else [{"role": "system", "content": _text(body.system)}]
    tree: dict[str, Any] = {"model": body.model, "messages": [*system, *(m for turn in body.messages for m in _turn(turn))]}
    if body.tools:
        tools = [{"name": tool.name, "description": tool.description, "parameters": tool.input_schema} for tool in body.tools]
        tree["tools"] = [{"type": "function", "function": {k: v for k, v in tool.items() if v is not None}} for tool in tools]
    if (choice := body.tool_choice) is not None:
        named = {"type": "function", "function": {"name": choice.name or ""}}
        tree["tool_choice"] = named if choice.type == "tool" else _CHOICES[choice.type]
        if choice.disable_parallel_tool_use is not None:
            tree["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(body, MessagesRequest):
        tree |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "temperature": body.temperature}
        tree |= {"top_p": body.top_p, "top_k": body.top_k}
        if body.stream:
            tree |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        return check(tree, ChatRequest)
    except ApiError as error:
        if error.param == "stop":  # by the name that it has here
            raise ApiError(400, f"stop_sequences{error.message.removeprefix('stop')}", param="stop_sequences", code=error.code) from None
        raise


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


def _turn(turn: Turn) -> list[dict[str, Any]]:
    """A turn of theirs as messages of ours: results of tools are messages by themselves, thoughts of earlier turns are left to
    the template."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": ("Error: " if block.is_error else "") + _text(block.content)}
        for block in turn.content
        if isinstance(block, ToolResultBlock)
    ]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in turn.content
        if isinstance(block, ToolUseBlock)
    ]
    text = _text([block for block in turn.content if isinstance(block, TextBlock)])
    thoughts = "\n".join(block.thinking for block in turn.content if block.type == "thinking")
    said = {"role": turn.role, "content": text} | ({"tool_calls": calls} if calls else {})
    said |= {"reasoning_content": thoughts} if thoughts else {}
    return [*results, said] if text or calls or not results else results


def _usage(usage: dict[str, Any] | None) -> dict[str, int]:
    usage = usage or {"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    told = {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached}
    return told | {"cache_creation_input_tokens": 0, "output_tokens": usage["completion_tokens"]}


def _ended(job: chat.Job, choice: dict[str, Any]) -> dict[str, Any]:
    stop = choice["stop_reason"] if choice["stop_reason"] in job.params.stop else None
    reason = "stop_sequence" if stop is not None else _REASONS.get(choice["finish_reason"])
    if reason is None:
        raise ApiError(500, f"the model's output ended with an error: {choice['stop_reason']}")
    return {"stop_reason": reason, "stop_sequence": stop}


def _head(job: chat.Job) -> dict[str, Any]:
    return {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": job.head["model"]}


def _message(job: chat.Job, answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    said = choice["message"]
    content: list[dict[str, Any]] = []
    if said.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": said["reasoning_content"], "signature": ""})
    if said["content"]:
        content.append({"type": "text", "text": said["content"]})
    for call in said.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        content.append({"type": "tool_use", "id": call["id"], "name": name, "input": _object(arguments)})
    return _head(job) | {"content": content, **_ended(job, choice), "usage": _usage(answer["usage"])}


def _object(arguments: str) -> dict[str, Any]:
    """A call that max_tokens cut short is no JSON."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {}


async def _events(job: chat.Job) -> AsyncIterator[dict[str, Any]]:
    """A stream of ours as one of theirs: blocks one after the other, each of one kind."""
    index, kind, choice, usage = -1, None, None, None
    async for chunk in job.chunks():
        if index < 0 and choice is None:
            yield {
                "type": "message_start",
                "message": _head(job) | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(None)},
            }
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            for now, block, delta in _parts(choice["delta"]):
                if now != kind:
                    if kind is not None:
                        yield {"type": "content_block_stop", "index": index}
                    index, kind = index + 1, now
                    yield {"type": "content_block_start", "index": index, "content_block": block}
                if delta is not None:
                    yield {"type": "content_block_delta", "index": index, "delta": delta}
    if kind is not None:
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _ended(job, choice), "usage": _usage(usage)}
    yield {"type": "message_stop"}


def _parts(delta: dict[str, Any]) -> list[tuple[Any, dict[str, Any], dict[str, Any] | None]]:
    """(which block it belongs to, how that begins, what it adds)."""
    parts: list[tuple[Any, dict[str, Any], dict[str, Any] | None]] = []
    if text := delta.get("reasoning_content"):
        parts.append(("thinking", {"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": text}))
    if text := delta.get("content"):
        parts.append(("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": text}))
    for call in delta.get("tool_calls", ()):
        block = {"type": "tool_use", "id": call.get("id"), "name": call["function"].get("name"), "input": {}}
        arguments = call["function"]["arguments"]
        parts.append((call["index"], block, {"type": "input_json_delta", "partial_json": arguments} if arguments else None))
    return parts
