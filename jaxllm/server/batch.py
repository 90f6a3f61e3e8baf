"""OpenAI's batch files: a request a line in, an answer a line out, by the handlers of the server and without HTTP.

Answers are written as they are ready, each whole and at once, and name their line of the input in `id` (`batch_req_0` is the first).
A run that is given the output of one that was cut short leaves out what is there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pydantic_core

from jaxllm.errors import ConfigError
from jaxllm.server import chat, completions, embeddings, responses
from jaxllm.server.body import check
from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.protocol.base import Body
from jaxllm.server.protocol.chat import ChatRequest
from jaxllm.server.protocol.completions import CompletionRequest
from jaxllm.server.protocol.embeddings import EmbeddingRequest
from jaxllm.server.protocol.responses import ResponsesRequest
from jaxllm.server.service import Service
from jaxllm.serving import EngineDeadError

_ID = "batch_req_"


class Line(Body):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


async def _chat(service: Service, body: ChatRequest) -> dict[str, Any]:
    return await (await chat.prepare(service, body)).answer()


async def _completion(service: Service, body: CompletionRequest) -> dict[str, Any]:
    return await (await completions.prepare(service, body)).answer()


async def _response(service: Service, body: ResponsesRequest) -> dict[str, Any]:
    if body.background or body.store or body.previous_response_id is not None:
        name = next(name for name in ("background", "store", "previous_response_id") if getattr(body, name))
        raise ApiError(400, f"{name} is not for batches: nothing is stored", param=name)
    return await responses.answer((await responses.prepare(service, responses.Store(0), body.model_copy(update={"store": False}))).answer)


_URLS: dict[str, tuple[type[Body], Callable[[Service, Any], Awaitable[dict[str, Any]]]]] = {
    "/v1/chat/completions": (ChatRequest, _chat),
    "/v1/completions": (CompletionRequest, _completion),
    "/v1/embeddings": (EmbeddingRequest, embeddings.answer),
    "/v1/responses": (ResponsesRequest, _response),
}


@dataclass
class BatchCounts:
    """Lines of the input: those that an earlier run had answered, those that this one did, and how many of these are errors."""

    resumed: int = 0
    completed: int = 0
    failed: int = 0
    lines: set[int] = field(default_factory=set, repr=False)  # of earlier runs


def read_done(output: Path, source: Path) -> BatchCounts:
    """What an earlier run has answered; a last line that was cut short is taken off the file. Raises ConfigError for a file that is
    not of `source`."""
    counts = BatchCounts()
    if not output.exists():
        return counts
    whole = 0
    names: dict[int, Any] = {}
    with output.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            whole += len(raw)
            try:
                answer = json.loads(raw)
                names[int(answer["id"].removeprefix(_ID))] = answer["custom_id"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{output} has a line that run-batch did not write: give another output file") from None
    for number, raw in _lines(source):
        if number not in names:
            continue
        if names.pop(number) != _custom_id(raw):
            raise ConfigError(f"{output} has answers to another input than {source} (line {number + 1}): give another output file")
        counts.lines.add(number)
    if names:
        raise ConfigError(f"{output} has answers to line {min(names) + 1} of its input, which {source} does not have")
    os.truncate(output, whole)
    return counts


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as file:
        for number, raw in enumerate(file):
            if raw.strip():
                yield number, raw


def _custom_id(raw: bytes) -> str | None:
    try:
        return json.loads(raw)["custom_id"]
    except (ValueError, KeyError, TypeError):
        return None


async def run_batch(
    service: Service, source: Path, output: Path, *, at_once: int, progress: Callable[[int], None] | None = None
) -> BatchCounts:
    """Answers what is not answered yet, so many lines at a time. Raises ConfigError, EngineDeadError or OSError."""
    counts = read_done(output, source)
    earlier, seen, places = counts.lines, {}, asyncio.Semaphore(at_once)
    with output.open("ab", buffering=0) as file:

        async def work(number: int, raw: bytes, first: int) -> None:
            try:
                answer = await _answer(service, number, raw, first)
                file.write(pydantic_core.to_json(answer) + b"\n")
                counts.completed += 1
                counts.failed += answer["response"]["status_code"] != 200
                if progress is not None:
                    progress(counts.completed)
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for number, raw in _lines(source):
                    name = _custom_id(raw)
                    first = number if name is None else seen.setdefault(name, number)
                    if number not in earlier:
                        await places.acquire()
                        tasks.create_task(work(number, raw, first))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # what ended the first ended the others
    counts.resumed = len(earlier)
    return counts


async def _answer(service: Service, number: int, raw: bytes, first: int) -> dict[str, Any]:
    status, name = 200, _custom_id(raw)
    try:
        if first != number:
            raise ApiError(400, f"custom_id {name!r:.100} is that of line {first + 1}, too: give each its own", param="custom_id")
        body = await _run(service, raw)
    except EngineDeadError:
        raise  # the line is for the next run
    except Exception as error:
        told = as_api_error(error)
        status, body = told.status, told.body("/v1")
    response = {"status_code": status, "request_id": uuid4().hex, "body": body}
    return {"id": f"{_ID}{number}", "custom_id": name, "response": response, "error": None}


async def _run(service: Service, raw: bytes) -> dict[str, Any]:
    try:
        tree = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the line is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the line must be a JSON object: custom_id, method, url, body")
    line = check(tree, Line)
    if line.method != "POST":
        raise ApiError(400, f"method must be POST, not {line.method!r:.100}", param="method")
    if line.url not in _URLS:
        raise ApiError(400, f"url must be {' or '.join(_URLS)}, not {line.url!r:.100}", param="url")
    model, answer = _URLS[line.url]
    body = check(line.body, model, warn=service.config.unknown_fields == "warn")
    if getattr(body, "stream", None):
        raise ApiError(400, "stream is not for batches: leave it out", param="stream")
    return await answer(service, body)
