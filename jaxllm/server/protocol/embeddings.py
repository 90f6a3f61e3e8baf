"""The body of /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from jaxllm.server.protocol.base import Body


class EmbeddingRequest(Body):
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None  # the model's own
    user: str | None = None  # goes to the access log
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
