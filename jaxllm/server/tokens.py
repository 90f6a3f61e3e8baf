"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.body import read_body
from jaxllm.server.conversation import render
from jaxllm.server.errors import ApiError
from jaxllm.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.server
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None:
        if body.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens is for a prompt: a chat template writes its own", param="add_special_tokens")
        ids = await asyncio.to_thread(render, service, body)
    else:
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise ApiError(400, f"{name} is for messages", param=name)
        ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt, body.add_special_tokens is not False)
    answer = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.id_to_token[i] for i in ids]
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.server
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model)
    return json_response({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})
