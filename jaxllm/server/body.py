"""From a request's bytes to its checked body."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from jaxllm.server.errors import ApiError
from jaxllm.server.streaming import ClientLeft

logger = logging.getLogger(__name__)


async def read_body[Model: pydantic.BaseModel](request: Request, model: type[Model]) -> Model:
    """Raises ApiError: 413 for one that is too long, 400 for one that is not what `model` says."""
    config = request.app.state.server.config
    raw = await _read(request, config.max_body_bytes)
    try:
        tree = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(tree)}")
    body = check(tree, model, warn=config.unknown_fields == "warn")
    request.scope["state"]["user"] = getattr(body, "user", None)
    return body


_PATIENCE = 64 << 20  # bytes too many that are still read: most clients look for an answer only when they have sent all


async def _read(request: Request, most: int) -> bytes:
    too_long = ApiError(413, f"the body is longer than this server's max_body_bytes={most}: send less at a time", code="body_too_large")
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size <= most:
                pieces.append(piece)
            elif size > most + _PATIENCE:
                break
    except ClientDisconnect:
        raise ClientLeft from None
    if size > most:
        raise too_long
    return b"".join(pieces)


def check[Model: pydantic.BaseModel](tree: dict[str, Any], model: type[Model], *, warn: bool = False) -> Model:
    """`tree` as a `model`; `warn`: fields that it does not have are left out with a line in the log. Raises ApiError."""
    try:
        return model.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
    extra = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if warn and extra:
        for problem in extra:
            logger.warning("left out the field %s, which is not implemented", _path(problem["loc"]))
        return check(_without(tree, [_real(tree, problem["loc"]) for problem in extra]), model)
    raise _error(extra[0] if extra else _deepest(problems), model)


def _error(problem: dict[str, Any], model: type[pydantic.BaseModel]) -> ApiError:
    path, loc = _path(problem["loc"]), problem["loc"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[0]), list(model.model_fields), n=1, cutoff=0.75) if len(loc) == 1 else []
        remedy = f"did you mean `{near[0]}`?" if near else "leave it out"
        return ApiError(400, f"`{path}` is not implemented here, and nothing is ignored: {remedy}", param=path, code="unknown_field")
    if problem["type"] == "missing":
        return ApiError(400, f"`{path}` is missing", param=path, code="missing_field")
    said = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else _lower(problem["msg"])
    message = said if said.startswith(path) else f"{path}{' ' if said.startswith('must') else ': '}{said}"
    if problem["type"] != "value_error":
        message += f" (it is {_kind(problem['input'])})"
    return ApiError(400, message, param=path or None, code="invalid_value")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _deepest(problems: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a choice between forms, the one whose error is furthest inside is the one that was meant."""
    return max(problems, key=lambda problem: len([part for part in problem["loc"] if isinstance(part, int)]))


def _path(loc: tuple[str | int, ...]) -> str:
    """`messages[0].content`, without the names that pydantic gives to the forms of a choice."""
    parts = [part for part in loc if isinstance(part, int) or part.isidentifier() and part not in _FORMS]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


_FORMS = {"str", "int", "bool", "float", "TextPart", "NamedTool", "Part", "NamedFunction"}


def _real(tree: Any, loc: tuple[str | int, ...]) -> list[str | int]:
    """The keys of `loc` that are in the tree; the names of forms are not."""
    path: list[str | int] = []
    for part in loc:
        here = tree
        for key in path:
            here = here[key]
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            path.append(part)
    return path


def _without(tree: Any, paths: list[list[str | int]]) -> Any:
    if isinstance(tree, dict):
        gone = {path[0] for path in paths if len(path) == 1}
        return {k: _without(v, [p[1:] for p in paths if p[:1] == [k]]) for k, v in tree.items() if k not in gone}
    if isinstance(tree, list):
        return [_without(v, [p[1:] for p in paths if p[:1] == [i]]) for i, v in enumerate(tree)]
    return tree


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
