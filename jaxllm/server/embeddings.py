"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.body import read_body
from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.embeddings import EmbeddingRequest
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response, until_gone
from jaxllm.serving import RequestOutput
from jaxllm.serving.pooling import embedding_params


async def embeddings(request: Request) -> Response:
    service: Service = request.app.state.server
    body = await read_body(request, EmbeddingRequest)
    return json_response(await until_gone(request.receive, answer(service, body)))


async def answer(service: Service, body: EmbeddingRequest) -> dict[str, Any]:
    """Raises ApiError, RequestError, TokenizerError, EngineDeadError or TimeoutError."""
    model = service.check_model(body.model)
    width = service.llm.embedding_dim
    if body.dimensions not in (None, width):
        message = f"dimensions={body.dimensions}: this model's embeddings have {width} and cannot be cut: leave dimensions out"
        raise ApiError(400, message, param="dimensions")
    prompts, done = await _prompts(service, body), {}
    async with aclosing(service.run(prompts, embedding_params(), shown=False, field="input")) as outputs:
        async for i, output in outputs:
            done[i] = output
    data = [{"object": "embedding", "index": i, "embedding": _written(done[i], body.encoding_format)} for i in range(len(prompts))]
    tokens = sum(len(output.prompt_token_ids) for output in done.values())
    head = {"id": f"embd-{uuid4().hex}", "object": "list", "model": model, "data": data}
    return head | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


async def _prompts(service: Service, body: EmbeddingRequest) -> list[dict[str, Any]]:
    given = body.input
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or not all(given):
        raise ApiError(400, "input has nothing in it: give a text, a list of token ids, or a list of those", param="input")
    special = body.add_special_tokens is not False
    labels = {"pooling": body.pooling or "last"} | ({} if body.cache_salt is None else {"cache_salt": body.cache_salt})

    def read(text: str | list[int]) -> dict[str, Any]:
        return {"prompt_token_ids": service.tokenizer.encode(text, add_special_tokens=special) if isinstance(text, str) else text} | labels

    return await asyncio.to_thread(lambda: [read(text) for text in given])


def _written(output: RequestOutput, encoding: str | None) -> list[float] | str:
    """base64: of float32, little-endian."""
    vector = output.embedding
    if vector is None or not np.isfinite(vector).all():
        raise ApiError(500, "the model's hidden states have a NaN or an infinity: there is no embedding")
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
