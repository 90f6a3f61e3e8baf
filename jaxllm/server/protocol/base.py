"""What request bodies have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, create_model

from jaxllm.errors import RequestError
from jaxllm.serving.sampling_params import PARAMETERS, Parameter, SamplingParams


class Body(BaseModel):
    """Strict: a field that is not there is an error, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _field(parameter: Parameter) -> Any:
    """The parameter's own check, and its schema; null is the same as leaving it out, as OpenAI's clients take it."""

    def check(value: Any) -> Any:
        try:
            return None if value is None else parameter.parse(value)
        except (ValueError, TypeError) as error:
            raise ValueError(str(error) or f"must be {parameter.must}, not {value!r:.100}") from None

    schema = {"anyOf": [parameter.schema, {"type": "null"}], "description": parameter.doc}
    return Annotated[Any, PlainValidator(check), WithJsonSchema(schema)]


Sampling = create_model("Sampling", __base__=Body, **{p.name: (_field(p), None) for p in PARAMETERS})
"""Every sampling parameter. Where OpenAI means something else by a name, subclasses say so."""


def sampling_params(body: BaseModel, **changes: Any) -> SamplingParams:
    """The sampling parameters that a body sets, with `changes`. Raises RequestError for those that do not go together."""
    said = {p.name: value for p in PARAMETERS if (value := getattr(body, p.name)) is not None}
    return SamplingParams(**(said | changes))


def structured_outputs(body: BaseModel) -> Any:
    """Of a body with a `response_format` too, which is another name of it. Raises RequestError for both."""
    asked = None if body.response_format is None else body.response_format.structured
    if asked is not None and body.structured_outputs is not None:
        raise RequestError("structured_outputs and response_format both say what the output must be: give one")
    return asked or body.structured_outputs


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generating(Sampling):
    """What /v1/completions and /v1/chat/completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # goes to the access log
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
