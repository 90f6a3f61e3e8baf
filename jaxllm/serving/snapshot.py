"""What an engine does at one moment, for people to look at."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jaxllm.serving.news import figures_of

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine


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
    figures = figures_of(engine)
    return {
        "time": now,
        "running": running,
        "waiting": figures.waiting,
        "pages": figures.pages + 1,  # page 0 is nobody's
        "pages_used": figures.pages - figures.free_pages,
        "steps": figures.steps,
        "host_s": figures.host_s,
        "tokens": engine.stats.tokens,
        "compiles_after_warmup": figures.compiles_after_warmup,
    }
