"""A chat's stream as the events of /v1/responses, and the response that they make up."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from jaxllm.server import chat
from jaxllm.server.errors import as_api_error
from jaxllm.server.protocol.responses import ResponsesRequest

Event = dict[str, Any]


class Answer:
    """One response, from when it is asked for to its end. `response`: as it is now."""

    def __init__(self, body: ResponsesRequest, job: chat.Job):
        self._job, self._number, self._choice, self._usage = job, 0, None, None
        self._item: dict[str, Any] | None = None  # that grows now
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "queued" if body.background else "in_progress",
            "background": bool(body.background),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": job.head["model"],
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": job.params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [{"strict": None, "parameters": None} | tool for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": job.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
        if body.text is not None and body.text.format is not None:
            self.response["text"] = {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)}

    @property
    def over(self) -> bool:
        return self.response["status"] not in ("queued", "in_progress")

    async def events(self) -> AsyncIterator[Event]:
        """What goes wrong before the first is raised; after it, it is an event."""
        started = False
        try:
            async with aclosing(self._job.chunks()) as chunks:
                async for chunk in chunks:
                    if not started:
                        started, self.response["status"] = True, "in_progress"
                        yield self._event("response.created", response=self._copy())
                        yield self._event("response.in_progress", response=self._copy())
                    for event in self._chunk(chunk):
                        yield event
            for event in self._end():
                yield event
        except Exception as error:
            told = as_api_error(error)
            self.fail(told.message, told.code)
            if not started:
                raise
            yield self._event("response.failed", response=self._copy())
        finally:  # whoever reads has gone, or it was cancelled
            if not self.over:
                self._close("incomplete")
                self.response |= {"status": "cancelled"}

    def fail(self, message: str, code: str | None = None) -> None:
        self._close("incomplete")
        self.response |= {"status": "failed", "error": {"code": code or "server_error", "message": message}}

    def _copy(self) -> dict[str, Any]:
        return self.response | {"output": list(self.response["output"])}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | fields

    def _here(self, kind: str, **fields: Any) -> Event:
        """An event of the item that grows."""
        return self._event(kind, item_id=self._item["id"], output_index=len(self.response["output"]) - 1, **fields)

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[Event]:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            self._choice, delta = choice, choice["delta"]
            logprobs = [_logprob(entry) for entry in (choice["logprobs"] or {}).get("content") or ()]
            if text := delta.get("reasoning_content"):
                yield from self._part("reasoning", text)
            if (text := delta.get("content")) or logprobs:
                yield from self._part("message", text or "", logprobs)
            for call in delta.get("tool_calls", ()):
                yield from self._call(call)

    def _part(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> Iterator[Event]:
        if self._item is None or self._item["type"] != kind:
            yield from self._finish()
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                yield self._begin({"type": kind, "id": f"msg_{uuid4().hex}", "role": "assistant", "content": []})
            else:
                part = {"type": "reasoning_text", "text": ""}
                yield self._begin({"type": kind, "id": f"rs_{uuid4().hex}", "summary": [], "content": []})
            yield self._here("response.content_part.added", content_index=0, part=dict(part))
            self._item["content"].append(part)
        part = self._item["content"][0]
        part["text"] += text
        if kind == "message":
            part["logprobs"] += logprobs or []
            yield self._here("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs or [])
        else:
            yield self._here("response.reasoning_text.delta", content_index=0, delta=text)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if "id" in call:
            yield from self._finish()
            item = {"type": "function_call", "id": f"fc_{uuid4().hex}", "call_id": call["id"], "name": function["name"], "arguments": ""}
            yield self._begin(item)
        if function["arguments"]:
            self._item["arguments"] += function["arguments"]
            yield self._here("response.function_call_arguments.delta", delta=function["arguments"])

    def _begin(self, item: dict[str, Any]) -> Event:
        self._item = item | {"status": "in_progress"}
        self.response["output"].append(self._item)
        content = {"content": []} if "content" in item else {}
        return self._event("response.output_item.added", output_index=len(self.response["output"]) - 1, item=self._item | content)

    def _finish(self, status: str = "completed") -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            yield self._here("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            kind, more = ("output_text", {"logprobs": part["logprobs"]}) if item["type"] == "message" else ("reasoning_text", {})
            yield self._here(f"response.{kind}.done", content_index=0, text=part["text"], **more)
            yield self._here("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.response["output"]) - 1, item=item)
        self._item = None

    def _close(self, status: str) -> None:
        if self._item is not None:
            self._item["status"], self._item = status, None

    def _end(self) -> Iterator[Event]:
        reason = self._choice["finish_reason"]
        if reason == "error":
            self.fail(f"the model's output ended with an error: {self._choice['stop_reason']}")
            yield self._event("response.failed", response=self._copy())
            return
        cut = reason == "length"
        if not self.response["output"]:
            yield from self._part("message", "")
        yield from self._finish("incomplete" if cut else "completed")
        self.response |= {"status": "incomplete" if cut else "completed", "completed_at": None if cut else int(time.time())}
        self.response |= {"incomplete_details": {"reason": "max_output_tokens"} if cut else None, "usage": self._counts()}
        yield self._event(f"response.{self.response['status']}", response=self._copy())

    def _counts(self) -> dict[str, Any]:
        """Tokens of thoughts are counted in their text: the marks around them are not among them."""
        thoughts = [item["content"][0]["text"] for item in self.response["output"] if item["type"] == "reasoning"]
        encode, used = self._job.service.tokenizer.encode, self._usage
        reasoning = sum(len(encode(text, add_special_tokens=False)) for text in thoughts)
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": used["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": min(reasoning, used["completion_tokens"])},
            "total_tokens": used["total_tokens"],
        }


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    """A chat's, without what this form does not have."""
    return {name: entry[name] for name in ("token", "bytes", "logprob", "top_logprobs") if name in entry}
