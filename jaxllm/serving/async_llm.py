"""The asynchronous Python API: many requests from asyncio, one engine in one thread."""

import asyncio
import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from jaxllm.config import from_dict
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.engine import Engine, get_tokenizer
from jaxllm.serving.executables import bundle_settings
from jaxllm.serving.logits import LogitsProcessor
from jaxllm.serving.prompt import Prompt, read_labels, read_prompt
from jaxllm.serving.request import RequestOutput, SamplingParams
from jaxllm.serving.structured import Matcher
from jaxllm.tokenizers import Tokenizer


class EngineDeadError(JaxLLMError, RuntimeError):
    """The engine's thread has ended, by `shutdown` or by an error, which is this one's cause; no request can be served."""


class _Stream:
    """The newest output of one request, on its way from the engine's thread to its event loop.

    Outputs hold all there is so far, so a slow reader finds the newest and misses nothing, and nothing piles up for it.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None


class AsyncLLM:
    """An engine that serves many coroutines, from any number of event loops.

        llm = AsyncLLM("demo")
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)

    Takes what `LLM` takes as keywords, and `max_pending`: how many requests may be unfinished at a time; further
    callers of `generate` wait their turn (None: no limit).
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        max_pending: int | None = None,
        logits_processors: Mapping[str, LogitsProcessor] | None = None,
        **options: Any,
    ):
        if max_pending is not None and (isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1):
            raise ConfigError(f"max_pending must be a whole number of at least 1, or None, not {max_pending!r}")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = from_dict(EngineConfig, {"model": model, **bundle_settings(options), **options}, where="AsyncLLM(...)")
        self.engine = Engine(self.config, logits_processors)
        self._max_pending, self._pending = max_pending, 0
        self._queue: deque[Future] = deque()  # callers that wait for a place
        self._numbers = itertools.count()
        self._streams: dict[str, _Stream] = {}  # of the engine's thread alone
        self._inbox: deque[tuple[Future, Callable[[], None]]] = deque()
        self._stopping = False
        self._wake = threading.Condition()
        self._dead: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> EngineDeadError | None:
        """Why no request can be served, if none can."""
        return self._dead

    def get_tokenizer(self) -> Tokenizer:
        return get_tokenizer(self.engine)

    @property
    def chat_template(self) -> str | None:
        return None if self.engine.tokenizer is None else self.engine.tokenizer.chat_template

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self.engine.limits.max_model_len

    @property
    def embedding_dim(self) -> int:
        """Length of a pooled prompt's vector."""
        return self.engine.runner.model.config.embedding_dim

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Continues a prompt, yielding all that there is so far whenever there is more.

        Leaving the loop, closing the iterator or cancelling the task aborts the request. Raises RequestError, or
        EngineDeadError.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        text, ids = read_prompt(prompt, params, self.engine)
        labels = read_labels(prompt)
        matcher = None if params.structured_outputs is None else await asyncio.to_thread(self.engine.matcher, params)
        request_id = f"async-{next(self._numbers)}" if request_id is None else request_id
        await self._take_place()
        stream = _Stream()
        try:
            added = self._post(lambda: self._add(request_id, ids, params, text, labels, matcher, stream))
            await asyncio.wrap_future(added)
            output = None
            while output is None or not output.finished:
                await stream.ready.wait()
                stream.ready.clear()
                if stream.error is not None:
                    raise stream.error
                if stream.output is not output:  # it may have been read when the wake-up before this one came
                    output = stream.output
                    yield output
        finally:
            self._post(lambda: self._abort(request_id, stream))
            self._give_place()

    async def ask[Answer](self, question: Callable[[Engine], Answer]) -> Answer:
        """What `question` returns of the engine, on the engine's thread between two steps. Raises EngineDeadError."""
        answers: list[Answer] = []
        await asyncio.wrap_future(self._post(lambda: answers.append(question(self.engine))))
        return answers[0]

    async def reset_prefix_cache(self) -> None:
        """Forgets all that earlier requests left in the KV cache. Raises EngineDeadError."""
        await asyncio.wrap_future(self._post(self.engine.reset_prefix_cache))

    def shutdown(self) -> None:
        """Stops the engine's thread; requests that are not finished get EngineDeadError. Calling it again does nothing."""
        self._post(self._stop)
        self._thread.join()

    # Places: at most `max_pending` requests are unfinished at a time, first come, first served.

    async def _take_place(self) -> None:
        with self._wake:
            if self._max_pending is None or self._pending < self._max_pending:
                self._pending += 1
                return
            turn: Future = Future()
            self._queue.append(turn)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            if not turn.cancel() and turn.done() and not turn.cancelled():
                self._give_place()  # the place came at the moment of the cancellation
            raise

    def _give_place(self) -> None:
        with self._wake:
            while self._queue:
                turn = self._queue.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._pending -= 1

    # The engine's thread: it alone touches the engine.

    def _post(self, action: Callable[[], None]) -> Future:
        """Has the engine's thread do something between two steps; the future has what it raised, if it did."""
        done: Future = Future()
        with self._wake:
            if self._dead is not None:
                done.set_exception(self._dead)
            else:
                self._inbox.append((done, action))
                self._wake.notify()
        return done

    def _add(self, request_id: str, ids, params, text: str | None, labels: dict[str, str], matcher: Matcher | None, stream: _Stream):
        self.engine.add_request(ids, params, prompt=text, request_id=request_id, matcher=matcher, **labels)
        self._streams[request_id] = stream

    def _abort(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:  # not another request that took the id when this one was refused
            del self._streams[request_id]
            self.engine.abort(request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._inbox and not self.engine.has_work:
                        self._wake.wait()
                while self._inbox:
                    self._act(*self._inbox.popleft())
                if self._stopping:
                    return self._die(None)
                if self.engine.has_work:
                    self._deliver(self.engine.step())
        except BaseException as error:
            self._die(error)

    def _act(self, done: Future, action: Callable[[], None]) -> None:
        if not done.set_running_or_notify_cancel():
            return  # whoever asked was cancelled before its turn came
        try:
            action()
        except BaseException as error:
            done.set_exception(error)
            if not isinstance(error, JaxLLMError):  # a bad request is its sender's alone
                raise
        else:
            done.set_result(None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hands outputs to their event loops, waking each loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.output = output
                by_loop.setdefault(stream.loop, []).append(stream)
                if output.finished:
                    del self._streams[output.request_id]
        _wake(by_loop)

    def _die(self, cause: BaseException | None) -> None:
        error = EngineDeadError("the engine was shut down" if cause is None else f"the engine's thread ended: {cause!r}")
        error.__cause__ = cause
        with self._wake:
            self._dead, actions, self._inbox = error, self._inbox, deque()
        by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for stream in self._streams.values():
            stream.error = error
            by_loop.setdefault(stream.loop, []).append(stream)
        self._streams.clear()
        _wake(by_loop)
        for done, _ in actions:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
        self.engine.close()  # when everyone has been told: it may fail on a broken device


def _wake(by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]]) -> None:
    for loop, streams in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: whoever read there has gone
            loop.call_soon_threadsafe(lambda streams=streams: [stream.ready.set() for stream in streams])
