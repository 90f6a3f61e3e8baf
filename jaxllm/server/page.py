"""The page at `/`, and what its live view of the engine asks for."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response
from jaxllm.serving.snapshot import snapshot

_FILE = Path(__file__).with_name("page.html")
# Nothing but this file and this server, whatever a model may write.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'"


async def page(request: Request) -> Response:
    return Response(_FILE.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})


async def engine(request: Request) -> Response:
    """What runs at this moment."""
    service: Service = request.app.state.server
    return json_response({"model": service.names[0]} | await service.llm.ask(snapshot))
