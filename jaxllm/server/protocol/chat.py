"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal

from jaxllm.server.protocol.base import Body, Generating


class TextPart(Body):
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class Message(Body):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class ChatRequest(Generating):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None  # there is one
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
