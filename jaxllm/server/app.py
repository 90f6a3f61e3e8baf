"""The app: which path does what."""

from __future__ import annotations

import re

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import jaxllm
from jaxllm.errors import JaxLLMError
from jaxllm.server import chat, completions, embeddings, info, messages, page, responses, tokens
from jaxllm.server.config import ServerConfig
from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.gate import Gate
from jaxllm.server.protocol.chat import ChatRequest
from jaxllm.server.protocol.completions import CompletionRequest
from jaxllm.server.protocol.embeddings import EmbeddingRequest
from jaxllm.server.protocol.messages import CountRequest, MessagesRequest
from jaxllm.server.protocol.responses import ResponsesRequest
from jaxllm.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response
from jaxllm.serving import AsyncLLM

_POST = [
    ("/v1/chat/completions", chat.chat_completions, ChatRequest),
    ("/v1/completions", completions.completions, CompletionRequest),
    ("/v1/responses", responses.responses, ResponsesRequest),
    ("/v1/embeddings", embeddings.embeddings, EmbeddingRequest),
    ("/v1/messages", messages.messages, MessagesRequest),
    ("/v1/messages/count_tokens", messages.count_tokens, CountRequest),
    ("/tokenize", tokens.tokenize, TokenizeRequest),
    ("/detokenize", tokens.detokenize, DetokenizeRequest),
]
_GET = [
    ("/v1/responses/{response_id}", responses.get),
    ("/v1/models", info.models),
    ("/v1/models/{name:path}", info.model),
    ("/health", info.health),
    ("/ready", info.ready),
    ("/version", info.version),
    ("/load", info.load),
    ("/metrics", info.metrics),
    ("/engine", page.engine),
    ("/", page.page),
]


def make_app(llm: AsyncLLM, config: ServerConfig | None = None) -> FastAPI:
    """An ASGI app that serves `llm`, which whoever made it shuts down."""
    config = config or ServerConfig()
    # The pages of docs that FastAPI makes load scripts from elsewhere; the document itself is at /openapi.json.
    app = FastAPI(title="jaxllm", version=jaxllm.__version__, docs_url=None, redoc_url=None)
    app.state.server, app.state.responses = Service(llm, config), responses.Store(config.max_stored_responses)
    for path, handler, _ in _POST:
        app.post(path, response_model=None)(handler)
    for path, handler in _GET:
        app.get(path, response_model=None)(handler)
    app.post("/v1/responses/{response_id}/cancel", response_model=None)(responses.cancel)
    app.delete("/v1/responses/{response_id}", response_model=None)(responses.delete)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (ApiError, JaxLLMError, TimeoutError):  # whatever else there is, the gate answers
        app.add_exception_handler(kind, _error)
    app.add_middleware(Gate, service=app.state.server)
    if config.allowed_origins:  # outside the gate, so that pages may read its refusals, and need no key to ask what they may
        told = ["X-Request-Id", "Retry-After"]
        options = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": told}
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, **options)
    app.openapi = lambda: _document(app)
    return app


def _document(app: FastAPI) -> dict:
    """OpenAPI's, with our bodies in it."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for path, _, body in _POST:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {body.__name__: schema}
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
            document["paths"][path]["post"]["requestBody"] = {"content": content, "required": True}
        for path, operations in document["paths"].items():  # handlers read them off the request, unseen by FastAPI
            for name in re.findall(r"\{(\w+)\}", path):
                parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for operation in operations.values():
                    operation.setdefault("parameters", []).append(parameter)
        app.openapi_schema = document
    return app.openapi_schema


async def _error(request: Request, error: Exception) -> Response:
    error = as_api_error(error)
    return json_response(error.body(request.url.path), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    told = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return json_response(told.body(request.url.path), told.status, dict(error.headers or {}))
