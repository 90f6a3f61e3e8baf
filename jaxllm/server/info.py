"""What a server says of itself: its models, its health, its load."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

import jaxllm
from jaxllm.server.errors import ApiError
from jaxllm.server.metrics import CONTENT_TYPE
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response


def _model(service: Service, name: str) -> dict:
    card = {"id": name, "object": "model", "created": service.created, "owned_by": "jaxllm"}
    return card | {"root": service.llm.config.model, "parent": None, "max_model_len": service.max_model_len}


async def models(request: Request) -> Response:
    service: Service = request.app.state.server
    return json_response({"object": "list", "data": [_model(service, name) for name in service.names]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.server
    return json_response(_model(service, service.check_model(request.path_params["name"])))


async def health(request: Request) -> Response:
    """200 while the engine lives and works; 503 with the reason when it does not."""
    if (error := request.app.state.server.trouble()) is not None:
        return json_response(error.body("/health"), 503)
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while new requests are taken."""
    if request.app.state.server.draining:
        return json_response(ApiError(503, "this server is shutting down", code="draining").body("/ready"), 503)
    return await health(request)


async def version(request: Request) -> Response:
    return json_response({"version": jaxllm.__version__})


async def metrics(request: Request) -> Response:
    return Response(request.app.state.server.metrics.text(), media_type=CONTENT_TYPE)


async def load(request: Request) -> Response:
    """`server_load`, as vLLM has it: requests' prompts that are not finished."""
    return json_response({"server_load": request.app.state.server.pending})
