"""What every request passes: its id, its key, a line in the access log, and an answer whatever happens."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.keys import current_client
from jaxllm.server.service import Service
from jaxllm.server.streaming import ClientLeft, json_response
from jaxllm.server.tracing import HEADERS, trace_headers

access = logging.getLogger("jaxllm.access")

_OPEN = {"/", "/health", "/ready", "/version", "/metrics"}  # without a key: what load balancers and scrapers ask for, and the page
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_LEFT = 499  # nginx's number for a client that went before its answer; nobody gets to see it


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.config, self._keys = app, service.config, service.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        trace_headers.set({name: headers[name] for name in HEADERS if name in headers})
        status = None

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._check_key(scope, headers)
            await self.app(scope, receive, tell)
        except ClientLeft:
            status = status or _LEFT
        except Exception as error:
            told = as_api_error(error)
            if status is None:
                await json_response(told.body(scope["path"]), told.status, told.headers)(scope, receive, tell)
        finally:
            if self.config.access_log:
                self._log(scope, request_id, status or _LEFT, time.perf_counter() - start)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or scope["path"] in _OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        client = self._keys.find(given)
        if client is None:
            what = "this API key is not one of this server's" if given else "this server wants an API key: Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key")
        current_client.set(client)
        scope["state"]["client"] = client.name

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        client = scope.get("client") or ("-",)
        path = re.sub(r"[^!-~]", "?", scope["path"])  # no line of the log is made up by a client
        line = f"{request_id} {client[0]} {scope['method']} {path} {status} {1e3 * seconds:.1f} ms"
        told = {name: value for name in ("client", "user") if (value := scope["state"].get(name))}
        access.info("%s" + "".join(f" {name}=%.100r" for name in told), line, *told.values())
