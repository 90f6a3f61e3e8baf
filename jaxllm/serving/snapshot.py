"""What an engine does at one moment, for people to look at."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

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
