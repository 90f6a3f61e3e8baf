"""/v1/responses: create, get, cancel, delete. What is stored is in this process's memory: the newest `max_stored_responses`."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server import chat
from jaxllm.server.body import read_body
from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.keys import current_client
from jaxllm.server.protocol.responses import INPUT_ITEMS, ResponsesRequest
from jaxllm.server.response_events import Answer
from jaxllm.server.response_input import add_item, as_chat, read_items
from jaxllm.server.service import Service
from jaxllm.server.streaming import Lines, event, json_response, stream_response, until_gone

logger = logging.getLogger(__name__)


def _failure(error: BaseException) -> bytes:
    told = as_api_error(error)
    return event({"type": "error", "code": told.code, "message": told.message, "param": told.param, "sequence_number": 0}, "error")


_LINES = Lines(lambda tree: event(tree, tree["type"]), _failure, b"")


@dataclass
class Stored:
    """A response, the conversation that it answers, whose it is, and what still works on it."""

    answer: Answer
    messages: list[dict[str, Any]]
    owner: str | None
    task: asyncio.Task | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """With the answer in it."""
        messages = [dict(message) for message in self.messages]
        for item in self.answer.response["output"]:
            add_item(messages, INPUT_ITEMS[item["type"]].model_validate(item))
        return messages


class Store:
    """The newest responses; each is there for the API key that made it."""

    def __init__(self, most: int):
        self._most, self._kept = most, OrderedDict[str, Stored]()

    def add(self, stored: Stored) -> None:
        """Those that still run are never dropped."""
        self._kept[stored.answer.response["id"]] = stored
        for name in [name for name, each in self._kept.items() if each.answer.over][: max(0, len(self._kept) - self._most)]:
            del self._kept[name]

    def get(self, name: str) -> Stored | None:
        stored = self._kept.get(name)
        return stored if stored is not None and stored.owner == _owner() else None

    def pop(self, name: str) -> None:
        self._kept.pop(name, None)


def _owner() -> str | None:
    client = current_client.get()
    return None if client is None else client.name


async def responses(request: Request) -> Response:
    service: Service = request.app.state.server
    body = await read_body(request, ResponsesRequest)
    stored = await prepare(service, request.app.state.responses, body)
    if body.background:
        stored.task = asyncio.create_task(_consume(stored.answer))
        return json_response(stored.answer.response)
    if body.stream:
        return await stream_response(request, stored.answer.events(), _LINES)
    return json_response(await until_gone(request.receive, answer(stored.answer)))


async def prepare(service: Service, store: Store, body: ResponsesRequest) -> Stored:
    """Raises ApiError, RequestError or TokenizerError."""
    if body.background and (body.stream or body.store is False):
        name = "stream" if body.stream else "store"
        raise ApiError(
            400, f"background=true with {name}={str(bool(body.stream)).lower()} is not implemented: ask again with GET", param=name
        )
    if (body.max_output_tokens or 0) > service.max_model_len:
        message = f"max_output_tokens={body.max_output_tokens} exceeds max_model_len={service.max_model_len}: ask for fewer"
        raise ApiError(400, message, param="max_output_tokens")
    warn = service.config.unknown_fields == "warn"
    messages = read_items(body.input, warn=warn)
    if body.previous_response_id is not None:
        before = store.get(body.previous_response_id)
        if before is None or before.answer.response["status"] not in ("completed", "incomplete"):
            message = f"there is no finished response {body.previous_response_id!r:.100} here: it was not stored, or has been dropped since"
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        messages = before.conversation() + messages
    job = await chat.prepare(service, as_chat(body, messages, warn=warn))
    stored = Stored(Answer(body, job), messages, _owner())
    if body.store is not False:
        store.add(stored)
    return stored


async def answer(made: Answer) -> dict[str, Any]:
    """The whole of it. Raises ApiError, RequestError, EngineDeadError or TimeoutError."""
    async with aclosing(made.events()) as events:
        async for _ in events:
            pass
    return made.response


async def _consume(made: Answer) -> None:
    try:
        await answer(made)
    except asyncio.CancelledError:
        pass
    except Exception as error:  # it is in the response
        logger.info("the response %s has failed: %s", made.response["id"], as_api_error(error).message)


def _find(request: Request) -> Stored:
    name = request.path_params["response_id"]
    for field in request.query_params:
        raise ApiError(400, f"`{field}` is not implemented here, and nothing is ignored: leave it out", param=field, code="unknown_field")
    stored = request.app.state.responses.get(name)
    if stored is None:
        raise ApiError(404, f"there is no response {name!r:.100} here: it was not stored, or has been dropped since", param="response_id")
    return stored


async def get(request: Request) -> Response:
    return json_response(_find(request).answer.response)


async def cancel(request: Request) -> Response:
    """Ends one that runs in the background; one that is over stays as it is."""
    stored = _find(request)
    if not stored.answer.response["background"]:
        raise ApiError(400, "only responses with background=true are cancelled: of another, close the connection", param="response_id")
    if not stored.task.done():
        stored.task.cancel()
        await asyncio.wait([stored.task])
    if not stored.answer.over:  # it was cancelled before it had begun
        stored.answer.response["status"] = "cancelled"
    return json_response(stored.answer.response)


async def delete(request: Request) -> Response:
    stored = _find(request)
    if stored.task is not None:
        stored.task.cancel()
    request.app.state.responses.pop(stored.answer.response["id"])
    return json_response({"id": stored.answer.response["id"], "object": "response", "deleted": True})
