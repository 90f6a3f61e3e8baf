"""Answers: whole or as server-sent events, and given up when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jaxllm.server.errors import as_api_error


class ClientLeft(Exception):
    """Nobody is there to answer."""


def json_response(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(pydantic_core.to_json(tree), status, headers, media_type="application/json")


async def until_gone[Result](request: Request, work: Awaitable[Result]) -> Result:
    """What `work` returns. Cancels it and raises ClientLeft when the client goes before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(tree: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + pydantic_core.to_json(tree) + b"\n\n"


@dataclass(frozen=True)
class Lines:
    """How a protocol writes its stream: each event, an error among them, and what comes last."""

    encode: Callable[[Any], bytes]
    error: Callable[[BaseException], bytes]
    end: bytes


OPENAI = Lines(event, lambda error: event(as_api_error(error).body()), b"data: [DONE]\n\n")


async def stream_response(request: Request, events: AsyncGenerator[Any], lines: Lines = OPENAI) -> Response:
    """The events as they come. What goes wrong before the first is an error of its own status; after that, it is an event.

    Raises what `events` raises first, or ClientLeft.
    """
    try:
        first = await until_gone(request, _next(events))
    except BaseException:
        await events.aclose()
        raise
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(_written(first, events, lines), media_type="text/event-stream", headers=headers)


async def _next(events: AsyncIterator[Any]) -> Any:
    return await anext(events)


async def _written(first: Any, events: AsyncGenerator[Any], lines: Lines) -> AsyncIterator[bytes]:
    async with aclosing(events):
        yield lines.encode(first)
        try:
            async for each in events:
                yield lines.encode(each)
        except Exception as error:
            yield lines.error(error)
        yield lines.end


class EventStream(StreamingResponse):
    """Closes what it reads from whenever it ends, so that a client that leaves ends its request."""

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)
