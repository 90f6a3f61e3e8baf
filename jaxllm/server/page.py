"""The page at `/`, and what its live view of the engine asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response
from jaxllm.serving.engine import Engine

_FILE = Path(__file__).with_name("page.html")
# Nothing but this file and this server, whatever a model may write.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'"


async def page(request: Request) -> Response:
    return Response(_FILE.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})


async def engine(request: Request) -> Response:
    """What runs at this moment."""
    service: Service = request.app.state.server
    return json_response({"model": service.names[0]} | await service.llm.ask(snapshot))


def snapshot(engine: Engine) -> dict[str, Any]:
    """On the engine's own thread. Times in seconds."""
    now, scheduler = time.monotonic(), engine.scheduler
    running = []
    for sequence in scheduler.running:
        completion = engine.completion(sequence.id)
        request = completion.request
        running.append(
            {
                "id": f"{request.request_id}/{completion.index}",
                "seconds": now - request.metrics.arrival_time,
                "prompt_tokens": len(request.prompt_token_ids),
                "output_tokens": len(completion.output_token_ids),
                "max_tokens": request.max_tokens,
                "pages": sequence.pages,
            }
        )
    return {
        "time": now,
        "running": running,
        "waiting": len(scheduler.waiting),
        "pages": engine.pool.capacity + 1,
        "pages_used": engine.pool.capacity - engine.pool.num_free,
        "steps": engine.stats.steps,
        "host_s": engine.stats.host_s,
        "tokens": engine.stats.tokens,
        "compiles_after_warmup": engine.runner.stats.compiles_after_warmup,
    }
