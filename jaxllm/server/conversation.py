"""From messages to a prompt's tokens."""

from __future__ import annotations

from typing import Any

import pydantic_core

from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.chat import ChatRequest, Message
from jaxllm.server.protocol.tokens import TokenizeRequest
from jaxllm.server.service import Service


def render(service: Service, body: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The conversation, and `tools`, through the model's chat template. Raises ApiError, RequestError or TokenizerError."""
    going_on = bool(body.continue_final_message)
    start = (not going_on) if body.add_generation_prompt is None else body.add_generation_prompt
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    taken = {"tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "return_assistant_mask"}
    if clash := sorted(taken & set(options)) + [name for name in options if not name.isidentifier()]:
        raise ApiError(400, f"chat_template_kwargs may not have {clash[0]!r}", param="chat_template_kwargs")
    if getattr(body, "documents", None) is not None:
        options["documents"] = body.documents
    if tools is not None:
        options["tools"] = tools
    messages = [_plain(i, message) for i, message in enumerate(body.messages)]
    template = lambda **more: service.tokenizer.apply_chat_template(
        messages, add_generation_prompt=start, continue_final_message=going_on, **options | more
    )
    ids = template()
    if tools is not None and ids == template(tools=None):
        raise ApiError(400, "this model's chat template says nothing of tools, so that the model would not know of them", param="tools")
    return ids


def _plain(i: int, message: Message) -> dict[str, Any]:
    """Text parts become one text, and calls' arguments an object: most templates know no other."""
    plain = message.model_dump(exclude_none=True)
    for j, call in enumerate(plain.get("tool_calls", ())):
        try:
            call["function"]["arguments"] = pydantic_core.from_json(call["function"]["arguments"] or "{}")
        except ValueError as error:
            where = f"messages[{i}].tool_calls[{j}].function.arguments"
            raise ApiError(400, f"{where} is not valid JSON: {error}", param=where) from None
        call.pop("index", None)
    if message.text is not None:
        plain["content"] = message.text
    if "reasoning" in plain:
        plain["reasoning_content"] = plain.pop("reasoning")
    if "content" not in plain and "refusal" in plain:
        plain["content"] = plain["refusal"]
    plain.pop("refusal", None)
    return plain
