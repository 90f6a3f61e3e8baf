"""The one engine behind an app, and the rules by which requests come to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.server.config import ServerConfig
from jaxllm.server.errors import ApiError
from jaxllm.server.keys import Client, current_client, read_keys
from jaxllm.server.metrics import Metrics
from jaxllm.server.tools import guess_parser
from jaxllm.server.tracing import Tracer
from jaxllm.serving import AsyncLLM, RequestOutput, SamplingParams


class Service:
    """What the handlers of one app share."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig):
        self.llm, self.config = llm, config
        self.keys = read_keys(config.keys, config.api_key_file)
        self.names = config.served_model_name or (llm.config.model,)
        template = llm.chat_template
        parser = guess_parser(template) if config.tool_call_parser == "auto" else config.tool_call_parser
        self.tool_parser = None if parser == "none" else parser  # a name of `tools.PARSERS`
        self.thinks = "<think>" in (template or "") if config.reasoning_parser == "auto" else config.reasoning_parser == "think"
        self.metrics = Metrics(llm, self.names[0])
        self.tracer = None if config.otlp_traces_endpoint is None else Tracer(config.otlp_traces_endpoint, self.names[0])
        self.created = int(time.time())
        self.draining = False
        self.pending = 0  # prompts that are not finished

    @property
    def tokenizer(self):
        return self.llm.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self.llm.max_model_len

    def trouble(self) -> ApiError | None:
        """Why the engine serves nobody, if that is so: it has died, or it hangs."""
        if (error := self.llm.dead) is not None:
            return ApiError(503, str(error), code="engine_dead")
        silent, limit = self.llm.silent_for, self.config.step_timeout
        if limit is None or silent <= limit:
            return None
        message = f"the engine hangs: {self.pending} prompts wait, and there has been no step for {silent:.0f} s (step_timeout={limit:g})"
        return ApiError(503, message, code="engine_hangs")

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError for another model than ours."""
        if name is not None and name not in self.names:
            message = f"there is no model {name!r} here: this server has {', '.join(repr(n) for n in self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or self.names[0]

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for so many prompts. Raises ApiError 429 if there is none, 503 if the server is about to end."""
        if self.draining:
            raise ApiError(503, "this server is shutting down: ask another", code="draining", retry_after=1)
        if self.pending + count > self.config.max_pending:
            message = f"{self.pending} prompts are waiting or running here, and max_pending={self.config.max_pending}: try again later"
            raise ApiError(429, message, code="queue_full", retry_after=1)
        self.pending += count
        try:
            yield
        finally:
            self.pending -= count

    async def run(
        self, prompts: Sequence[dict[str, Any]], params: SamplingParams, *, shown: bool = True, field: str = "prompt"
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(which prompt, all that there is of it so far), whenever there is more. Closing it aborts what is not finished.

        `shown`: whether anybody gets to see what is drawn; `field`: of the request that has the prompts.
        Raises RequestError, EngineDeadError, ApiError, or TimeoutError.
        """
        if len(prompts) * params.n > self.config.max_prompts:
            message = f"{len(prompts)} prompts with n={params.n} are more than this server's max_prompts={self.config.max_prompts}"
            raise ApiError(400, f"{message}: send fewer at a time", param="n" if len(prompts) == 1 else field)
        limit = self.config.request_timeout
        deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        client = current_client.get()
        with self.places(len(prompts)):
            if client is not None:
                client.enter()
            streams = [self._watched(prompt, params, client, shown) for prompt in prompts]
            async with aclosing(merge(streams) if len(streams) > 1 else _alone(streams[0])) as outputs:
                if deadline is None:  # it costs every token
                    async for news in outputs:
                        yield news
                    return
                while True:
                    async with asyncio.timeout_at(deadline):
                        news = await anext(outputs, None)
                    if news is None:
                        return
                    yield news

    async def _watched(
        self, prompt: dict[str, Any], params: SamplingParams, client: Client | None, shown: bool
    ) -> AsyncIterator[RequestOutput]:
        watch, counted, output = None, 0, None
        if client is not None:
            prompt = prompt | {"tenant": client.name}
        try:
            async with aclosing(self.llm.generate(prompt, params)) as outputs:
                watch = self.metrics.watch(params, shown=shown)
                async for output in outputs:
                    tokens = watch.news(output)
                    counted += tokens
                    if client is not None:
                        client.spend_tokens(tokens)
                    yield output
        except RequestError:
            watch = None  # it was refused, so it never ran
            raise
        finally:
            if watch is not None:
                watch.close()
                if self.tracer is not None and output is not None:
                    self.tracer.tell(output, params)
                if client is not None and not counted:  # it left before the first token, and the prompt was computed for nothing
                    client.spend_tokens(len(prompt["prompt_token_ids"]))


async def _alone(stream: AsyncIterator[RequestOutput]) -> AsyncIterator[tuple[int, RequestOutput]]:
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


async def merge(streams: Sequence[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The streams side by side; of each, the newest when it is asked for. The first error ends all."""
    news: dict[int, RequestOutput] = {}
    ready = asyncio.Event()

    async def pump(i: int, stream: AsyncIterator[RequestOutput]) -> None:
        async with aclosing(stream):
            async for output in stream:
                news[i] = output
                ready.set()

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(lambda _: ready.set())
    try:
        while news or not all(task.done() for task in tasks):
            await ready.wait()
            ready.clear()
            for task in tasks:
                if task.done():
                    task.result()
            while news:
                i = next(iter(news))
                yield i, news.pop(i)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
