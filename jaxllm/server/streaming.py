"""Answers: whole or as server-sent events, and given up when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.server.errors import as_api_error


class ClientLeft(Exception):
    """Nobody is there to answer."""


def json_response(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(pydantic_core.to_json(tree), status, headers, media_type="application/json")


async def until_gone[Result](receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` returns. Cancels it and raises ClientLeft when the client goes before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
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


OPENAI = Lines(event, lambda error: event(as_api_error(error).body("/v1")), b"data: [DONE]\n\n")


async def stream_response(request: Request, events: AsyncGenerator[Any], lines: Lines = OPENAI) -> Response:
    """The events as they come. What goes wrong before the first is an error of its own status; after that, it is an event.

    Raises what `events` raises first, or ClientLeft.
    """
    try:
        first = await until_gone(request.receive, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, lines)


async def _next(events: AsyncIterator[Any]) -> Any:
    return await anext(events)


class EventStream(Response):
    """Writes events until there are no more, or the client has gone; then it closes what they come from, which ends its request. (Every
    token passes here: Starlette's StreamingResponse does the same with two more generators.)"""

    media_type = "text/event-stream"

    def __init__(self, first: Any, events: AsyncGenerator[Any], lines: Lines):
        self.status_code, self.background = 200, None
        self._first, self._events, self._lines = first, events, lines
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await until_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        lines, tell = self._lines, lambda piece: send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await tell(lines.encode(self._first))
        try:
            async for each in self._events:
                await tell(lines.encode(each))
        except Exception as error:
            await tell(lines.error(error))
        await send({"type": "http.response.body", "body": lines.end, "more_body": False})
