"""A client for measuring: one connection a request, server-sent events, and the moment of each."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jaxllm.errors import ConfigError


@dataclass
class Measured:
    """One request. Moments in seconds by `time.perf_counter`; `error`: why it failed."""

    start: float = 0.0
    moments: list[float] = field(default_factory=list)  # at which something came
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    end: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.moments[0] - self.start

    @property
    def latency(self) -> float:
        return self.moments[-1] - self.start

    @property
    def tpot(self) -> float:
        """Of those with two tokens and more."""
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]


async def stream(url: str, body: dict[str, Any], headers: dict[str, str]) -> Measured:
    """Posts a streamed completion (or chat) and follows it to its end. Never raises: what goes wrong is in `error`."""
    result = Measured(start=time.perf_counter())
    try:
        async for data in _events(url, body, headers):
            event = json.loads(data)
            if "error" in event:
                raise ValueError(event["error"].get("message", data) if isinstance(event["error"], dict) else event["error"])
            if usage := event.get("usage"):
                result.prompt_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in event.get("choices", ()):
                said = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                if said or choice.get("finish_reason") is not None and not result.moments:
                    result.moments.append(time.perf_counter())
                    result.text += said
        if not result.moments:
            raise ValueError("the stream ended before anything came")
        if not result.output_tokens:
            raise ValueError("the server sent no usage: it does not know stream_options.include_usage")
    except (OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError) as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end = time.perf_counter()
    return result


async def _events(url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[str]:
    """The `data:` lines of an answer, up to `[DONE]`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"base_url must be http://HOST:PORT or https://..., not {url!r}")
    context = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context, limit=1 << 20)
    try:
        raw = json.dumps(body).encode()
        head = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(raw)), "Connection": "close", **headers}
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            chunked = chunked or line.lower().replace(b" ", b"").startswith(b"transfer-encoding:chunked")
        pending = b""
        async for piece in _pieces(reader, chunked):
            pending += piece
            if status == 200:
                *done, pending = pending.split(b"\n")
                for line in done:
                    if line.startswith(b"data:"):
                        data = line[5:].strip().decode()
                        if data == "[DONE]":
                            return
                        yield data
        if status != 200:
            raise ValueError(f"status {status}: {pending[:500].decode('utf-8', 'replace')}")
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while not chunked:
        if not (piece := await reader.read(1 << 16)):
            return
        yield piece
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()
