"""Errors as clients get them: OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, or Anthropic's on its own paths."""

from __future__ import annotations

import logging
import re
from typing import Any

from jaxllm.errors import RequestError, TokenizerError
from jaxllm.serving import EngineDeadError
from jaxllm.serving.sampling_params import PARAMETERS

logger = logging.getLogger(__name__)

_LONGEST = 1000  # characters of a message
_PARAMETERS = {parameter.name for parameter in PARAMETERS}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC = "/v1/messages"


class ApiError(Exception):
    """An answer that is an error. `param`: the field that is wrong; `retry_after`: seconds until it is worth another try."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."  # it may quote what the client sent
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, path: str) -> dict[str, Any]:
        """In the shape of the protocol that `path` is of."""
        if not path.startswith(_ANTHROPIC):
            return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        kind = {413: "request_too_large"}.get(self.status, "api_error" if self.status >= 500 else self.type)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception. One that nobody foresaw is logged, and its message stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | TokenizerError):
        name = re.match(r"\w*", str(error))[0]
        return ApiError(400, str(error), param=name if name in _PARAMETERS else None)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead", retry_after=5)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server's request_timeout", code="timeout")
    logger.error("an unforeseen error: this is a bug in jaxllm, please report it", exc_info=error)
    return ApiError(500, "an internal error, which the server's log tells more about")
