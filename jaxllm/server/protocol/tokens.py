"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from jaxllm.server.protocol.base import Body
from jaxllm.server.protocol.chat import Message


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
