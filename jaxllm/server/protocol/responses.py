"""The body of /v1/responses. Items of `input` and `tools` are checked by their `type`, in `INPUT_ITEMS` and `Function`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jaxllm.server.protocol.base import Body
from jaxllm.server.protocol.chat import Function

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None  # what answers have is taken back
    logprobs: list[Any] | None = None


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: Status | None = None


class Thought(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    type: Literal["reasoning"]
    summary: list[Thought] = []
    content: list[Thought] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: None = None


INPUT_ITEMS: dict[str, type[Body]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


class FunctionTool(Function):
    type: Literal["function"]


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None  # it always is


class Text(Body):
    format: Format | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class ResponsesRequest(Body):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    text: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None  # there is one
    user: str | None = None  # goes to the access log
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
