"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.body import read_body
from jaxllm.server.conversation import render
from jaxllm.server.errors import ApiError
from jaxllm.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from jaxllm.server.progress import Progress, usage
from jaxllm.server.protocol.base import sampling_params, structured_outputs
from jaxllm.server.protocol.chat import ChatRequest
from jaxllm.server.reading import Reader, Reading, plan_reading
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response, stream_response, until_gone
from jaxllm.serving import RequestOutput, SamplingParams
from jaxllm.serving.request import CompletionOutput


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.server
    job = await prepare(service, await read_body(request, ChatRequest))
    if job.body.stream:
        return await stream_response(request, job.chunks())
    return json_response(await until_gone(request.receive, job.answer()))


async def prepare(service: Service, body: ChatRequest) -> Job:
    """Checks a body as far as it can be without the engine. Raises ApiError, RequestError or TokenizerError."""
    service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is the old name of max_completion_tokens: give one of them", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    if body.store:
        raise ApiError(400, "store=true is not implemented: nothing is stored", param="store")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    changes = {"max_tokens": body.max_tokens or body.max_completion_tokens, "logprobs": logprobs}
    reading = plan_reading(service, body)
    if reading.marks_are_special:
        changes["skip_special_tokens"] = False
    params = sampling_params(body, **changes, structured_outputs=reading.structured or structured_outputs(body))
    ids = await asyncio.to_thread(render, service, body, reading.tools)
    begun = service.tokenizer.decode(ids[-8:], skip_special_tokens=False).rstrip() if reading.thinks else ""
    inside_thought = begun.endswith("<think>")
    if reading.thinks and params.structured_outputs is not None and not begun.endswith("</think>"):
        params = replace(params, structured_outputs=replace(params.structured_outputs, thinking="open" if inside_thought else "may"))
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    return Job(service, body, params, {"prompt_token_ids": ids} | salt, reading, inside_thought)


class Job:
    """One request of /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatRequest, params: SamplingParams, prompt: dict[str, Any], reading: Reading, inside: bool):
        """`inside`: the prompt ends within a thought."""
        self.service, self.body, self.params, self.prompt = service, body, params, prompt
        self.reading, self.inside_thought = reading, inside
        self.names = TokenNames(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self.head = {
            "id": f"chatcmpl-{body.request_id or uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.check_model(body.model),
        }

    def run(self):
        return aclosing(self.service.run([self.prompt], self.params))

    async def answer(self) -> dict[str, Any]:
        done: RequestOutput | None = None
        async with self.run() as outputs:
            async for _, output in outputs:
                done = output
        answer = self.head | {"choices": [self._choice(each) for each in done.outputs], "usage": usage([done])}
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(done.prompt_logprobs)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = done.prompt_token_ids
        return answer

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        options, progress = self.body.stream_options, Progress()
        with_usage = options is not None and options.include_usage

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            used = {"usage": progress.usage() if options.continuous_usage_stats else None} if with_usage else {}
            return self.head | {"choices": [choice]} | used

        readers: dict[int, Reader] = {}
        told = False  # what there is to tell of the prompt, which all choices share
        async with self.run() as outputs:
            async for i, output in outputs:
                for delta in progress.deltas(i, output):
                    each = delta.output
                    if delta.first:
                        hello = self._form(each, {"delta": {"role": "assistant", "content": self._echo()}}, None, None)
                        if self.body.return_token_ids:
                            hello["prompt_token_ids"] = output.prompt_token_ids
                        if self.body.prompt_logprobs is not None and not told:
                            hello["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
                        told = True
                        yield chunk(hello)
                    reader = readers.setdefault(each.index, self._reader())
                    news = reader.feed(delta.text, last=each.finished)
                    if not (news or each.finished or delta.logprobs or self.body.return_token_ids):
                        continue  # it may yet become a call
                    form = self._form(each, {"delta": news}, delta.token_ids, delta.logprobs)
                    yield chunk(form | self._end(each, reader))
        if with_usage:
            yield self.head | {"choices": [], "usage": progress.usage()}

    def _echo(self) -> str:
        """With `echo` (vLLM's), the last message, which the answer goes on from."""
        return (self.body.messages[-1].text or "") if self.body.echo else ""

    def _choice(self, each: CompletionOutput) -> dict[str, Any]:
        reader = self._reader()
        message = reader.message(each.text)
        if echo := self._echo():
            message["content"] = echo + (message["content"] or "")
        return self._form(each, {"message": message}, each.token_ids, each.logprobs) | self._end(each, reader)

    def _reader(self) -> Reader:
        return Reader(self.reading, inside_thought=self.inside_thought)

    def _end(self, each: CompletionOutput, reader: Reader) -> dict[str, Any]:
        return {"finish_reason": reader.finish_reason(each.finish_reason), "stop_reason": each.stop_reason}

    def _form(self, each: CompletionOutput, said: dict[str, Any], tokens, logprobs) -> dict[str, Any]:
        shown = None if logprobs is None else chat_logprobs(tokens, logprobs, self.params.logprobs, self.names)
        choice = {"index": each.index, **said, "logprobs": shown, "finish_reason": None}
        return choice | {"token_ids": tokens} if self.body.return_token_ids and tokens is not None else choice
