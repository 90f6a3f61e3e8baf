"""From messages to a prompt's tokens."""

from __future__ import annotations

from typing import Any

from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.chat import ChatRequest, Message
from jaxllm.server.protocol.tokens import TokenizeRequest
from jaxllm.server.service import Service


def render(service: Service, body: ChatRequest | TokenizeRequest) -> list[int]:
    """The conversation through the model's chat template. Raises ApiError, RequestError or TokenizerError."""
    going_on = bool(body.continue_final_message)
    start = (not going_on) if body.add_generation_prompt is None else body.add_generation_prompt
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    taken = {"tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "return_assistant_mask"}
    if clash := sorted(taken & set(options)) + [name for name in options if not name.isidentifier()]:
        raise ApiError(400, f"chat_template_kwargs may not have {clash[0]!r}", param="chat_template_kwargs")
    if getattr(body, "documents", None) is not None:
        options["documents"] = body.documents
    messages = [_plain(message) for message in body.messages]
    return service.tokenizer.apply_chat_template(messages, add_generation_prompt=start, continue_final_message=going_on, **options)


def _plain(message: Message) -> dict[str, Any]:
    """Text parts become one text: most templates know no other."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text or part.refusal or "" for part in message.content)
    if "reasoning" in plain:
        plain["reasoning_content"] = plain.pop("reasoning")
    if "content" not in plain and "refusal" in plain:
        plain["content"] = plain["refusal"]
    plain.pop("refusal", None)
    return plain
