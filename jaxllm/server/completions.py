"""/v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.server.body import read_body
from jaxllm.server.errors import ApiError
from jaxllm.server.logprobs import TokenNames, legacy_logprobs, prompt_logprobs
from jaxllm.server.progress import Delta, Progress, usage
from jaxllm.server.protocol.base import sampling_params, structured_outputs
from jaxllm.server.protocol.completions import CompletionRequest
from jaxllm.server.service import Service
from jaxllm.server.streaming import json_response, stream_response, until_gone
from jaxllm.serving import RequestOutput, SamplingParams
from jaxllm.serving.request import CompletionOutput


async def completions(request: Request) -> Response:
    service: Service = request.app.state.server
    job = await prepare(service, await read_body(request, CompletionRequest))
    if job.body.stream:
        return await stream_response(request, job.chunks())
    return json_response(await until_gone(request.receive, job.answer()))


async def prepare(service: Service, body: CompletionRequest) -> Job:
    """Checks a body as far as it can be without the engine. Raises ApiError, RequestError or TokenizerError."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    changes: dict[str, Any] = {"max_tokens": 16 if body.max_tokens is None else body.max_tokens}
    alone = body.max_tokens == 0  # the prompt and its log-probabilities: one token is drawn, and not shown
    if alone:
        if not body.echo:
            raise ApiError(400, "max_tokens must be at least 1, unless echo=true asks for the prompt alone", param="max_tokens")
        changes["max_tokens"] = 1
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        changes["prompt_logprobs"] = body.logprobs
    params = sampling_params(body, **changes, structured_outputs=structured_outputs(body))
    return Job(service, body, params, await _prompts(service, body), alone)


async def _prompts(service: Service, body: CompletionRequest) -> list[dict[str, Any]]:
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt has nothing in it: give a text, a list of token ids, or a list of those", param="prompt")
    special = body.add_special_tokens is not False

    def read(prompt: str | list[int]) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt}
        return {"prompt": prompt, "prompt_token_ids": service.tokenizer.encode(prompt, add_special_tokens=special)}

    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    return await asyncio.to_thread(lambda: [read(prompt) | salt for prompt in given])


class Job:
    """One request of /v1/completions."""

    def __init__(self, service: Service, body: CompletionRequest, params: SamplingParams, prompts: list[dict[str, Any]], alone: bool):
        self.service, self.body, self.params, self.prompts, self.alone = service, body, params, prompts, alone
        self.names = TokenNames(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._echoes: dict[int, str] = {}
        self.head = {
            "id": f"cmpl-{body.request_id or uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.check_model(body.model),
        }

    def run(self):
        return aclosing(self.service.run(self.prompts, self.params, shown=not self.alone))

    async def answer(self) -> dict[str, Any]:
        done: dict[int, RequestOutput] = {}
        async with self.run() as outputs:
            async for i, output in outputs:
                done[i] = output
        whole = lambda each: Delta(each.text, each.token_ids, each.logprobs, 0, True, each)
        choices = [self._choice(i, done[i], whole(each)) for i in range(len(self.prompts)) for each in done[i].outputs]
        return self.head | {"choices": choices, "usage": self._used(usage(list(done.values())))}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        options, progress = self.body.stream_options, Progress()
        with_usage = options is not None and options.include_usage
        async with self.run() as outputs:
            async for i, output in outputs:
                for delta in progress.deltas(i, output):
                    chunk = self.head | {"choices": [self._choice(i, output, delta)]}
                    if with_usage:
                        chunk["usage"] = self._used(progress.usage()) if options.continuous_usage_stats else None
                    yield chunk
        if with_usage:
            yield self.head | {"choices": [], "usage": self._used(progress.usage())}

    def _used(self, used: dict[str, Any]) -> dict[str, Any]:
        return used | {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]} if self.alone else used

    def _echo(self, i: int, output: RequestOutput) -> str:
        if not self.body.echo:
            return ""
        if i not in self._echoes:
            text = self.prompts[i].get("prompt")
            self._echoes[i] = self.service.tokenizer.decode(output.prompt_token_ids) if text is None else text
        return self._echoes[i]

    def _choice(self, i: int, output: RequestOutput, new: Delta) -> dict[str, Any]:
        """Of one continuation, what is new, which may be all of it. The first has what there is to tell of the prompt too."""
        tokens, logprobs, text, offset = new.token_ids, new.logprobs, new.text, new.offset
        if self.alone:
            tokens, logprobs, text = [], None if logprobs is None else [], ""
        echo = self._echo(i, output)
        if not new.first:
            offset += len(echo)
        elif self.body.echo:
            text = echo + text
            if logprobs is not None:
                tokens, logprobs = output.prompt_token_ids + tokens, [*output.prompt_logprobs, *logprobs]
        choice = self._form(i, new.output, text, tokens, logprobs, offset)
        if self.alone:
            choice |= {"finish_reason": "length", "stop_reason": None}
        if new.first and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if new.first and self.body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _form(self, i: int, each: CompletionOutput, text: str, tokens, logprobs, offset: int) -> dict[str, Any]:
        shown = None if logprobs is None else legacy_logprobs(tokens, logprobs, self.params.logprobs, self.names, offset)
        choice = {"index": i * self.params.n + each.index, "text": text, "logprobs": shown}
        choice |= {"finish_reason": each.finish_reason, "stop_reason": each.stop_reason}
        return choice | {"token_ids": tokens} if self.body.return_token_ids else choice
