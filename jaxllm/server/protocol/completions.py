"""The body of /v1/completions."""

from __future__ import annotations

from jaxllm.server.protocol.base import Generating
from jaxllm.server.protocol.chat import ResponseFormat


class CompletionRequest(Generating):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    max_tokens: int | None = None  # 0 with echo: the prompt alone
