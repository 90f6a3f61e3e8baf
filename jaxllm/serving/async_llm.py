"""The asynchronous Python API: many requests from asyncio, one engine in a thread or a process of its own."""

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoints import resolve_model
from jaxllm.config import from_dict
from jaxllm.errors import ConfigError
from jaxllm.serving.bundle import bundle_settings
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.find_tokenizer import read_tokenizer
from jaxllm.serving.news import EngineDeadError, EngineFigures, Listener, News
from jaxllm.serving.prompt import Prompt, need_tokenizer, read_labels, read_prompt
from jaxllm.serving.request import RequestOutput
from jaxllm.serving.sampling_params import SamplingParams
from jaxllm.tokenizers import Tokenizer

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine
    from jaxllm.serving.logits import LogitsProcessor


class _Stream:
    """The newest output of one request, on its way from the thread that has the engine's news to its event loop.

    Outputs hold all there is so far, so a slow reader finds the newest and misses nothing, and nothing piles up for it.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None
        self._waiter: asyncio.Future | None = None

    async def after(self, output: RequestOutput | None) -> RequestOutput:
        """What is newer than `output`. Raises the error that has ended the stream."""
        while self.error is None and self.output is output:
            self._waiter = self.loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        return self.output

    def wake(self) -> None:
        """On the loop, when there may be something new."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM:
    """An engine that serves many coroutines, from any number of event loops.

        llm = AsyncLLM("demo")
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=50)):
            print(output.outputs[0].text)

    Takes what `LLM` takes as keywords, and `max_pending`: how many requests may be unfinished at a time; further
    callers of `generate` wait their turn (None: no limit). `engine_process`: the engine runs in a process of its own, which is
    started again when it dies (`EngineProcess`), in place of a thread of this one.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        max_pending: int | None = None,
        logits_processors: "Mapping[str, LogitsProcessor] | None" = None,
        engine_process: bool = False,
        **options: Any,
    ):
        if max_pending is not None and (isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1):
            raise ConfigError(f"max_pending must be a whole number of at least 1, or None, not {max_pending!r}")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = from_dict(EngineConfig, {"model": model, **bundle_settings(options), **options}, where="AsyncLLM(...)")
        self._max_pending, self._pending = max_pending, 0
        self._queue: deque[Future] = deque()  # callers that wait for a place
        self._numbers = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()  # of all these
        self._owed: float | None = None  # since when the engine has to tell something; None: it has nothing to do
        self.on_step: Callable[[int], None] | None = None  # is told how many tokens each step has, on a thread of the engine's
        listener = Listener(self._deliver, self._end)
        if engine_process:
            if logits_processors:
                raise ConfigError("logits_processors are functions of this process: leave engine_process out")
            from jaxllm.serving.engine_process import EngineProcess

            resolve_model(self.config.model)  # fetched once, and not by both
            if self.config.tokenizer is not None and not self.config.skip_tokenizer_init:
                resolve_model(self.config.tokenizer, only="tokenizer")
            self.backend = EngineProcess(self.config, listener)
            try:
                self._tokenizer = read_tokenizer(self.config)  # while the engine loads
            except BaseException:
                self.backend.give_up()
                raise
            self.backend.wait()
        else:
            from jaxllm.serving.engine_thread import EngineThread

            self.backend = EngineThread(self.config, listener, logits_processors)
            self._tokenizer = self.backend.engine.tokenizer

    @property
    def engine(self) -> "Engine":
        """Where it is a thread of this process; its thread alone may do more than look. Raises ConfigError where it is not."""
        if not hasattr(self.backend, "engine"):
            raise ConfigError("this engine is in another process: use `ask`, or engine_process=False")
        return self.backend.engine

    @property
    def dead(self) -> EngineDeadError | None:
        """Why no request can be served, if none can."""
        return self.backend.dead

    @property
    def restarts(self) -> int:
        """Times that the engine died and was started again."""
        return self.backend.restarts

    @property
    def silent_for(self) -> float:
        """Seconds without any news of the engine since it was last asked for something, or told something while it had more to do; 0:
        it has nothing to do. If they are many more than a step takes, it hangs."""
        owed = self._owed
        return 0.0 if owed is None else time.monotonic() - owed

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self.backend.facts.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at the same time."""
        return self.backend.facts.max_num_seqs

    @property
    def embedding_dim(self) -> int:
        """Length of a pooled prompt's vector."""
        return self.backend.facts.embedding_dim

    @property
    def figures(self) -> EngineFigures:
        """Of this moment, or of the last step of an engine in another process."""
        return self.backend.figures

    def get_tokenizer(self) -> Tokenizer:
        return need_tokenizer(self._tokenizer)

    @property
    def chat_template(self) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.chat_template

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Continues a prompt, yielding all that there is so far whenever there is more.

        Leaving the loop, closing the iterator or cancelling the task aborts the request. Raises RequestError, or
        EngineDeadError.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        text, ids = read_prompt(prompt, params, self._tokenizer)
        labels, number = read_labels(prompt), next(self._numbers)
        request_id = f"async-{number}" if request_id is None else request_id
        await self._take_place()
        stream, output = _Stream(), None
        try:
            with self._lock:
                self._streams[number] = stream
                if self._owed is None and self.dead is None:
                    self._owed = time.monotonic()  # it has a turn after whatever it is asked, if only to forget it again
            await asyncio.wrap_future(self.backend.add(number, request_id, ids, params, text, labels))
            while output is None or not output.finished:
                output = await stream.after(output)
                yield output
        finally:
            with self._lock:
                self._streams.pop(number, None)
            if output is None or not output.finished:
                self.backend.abort(number)
            self._give_place()

    async def ask[Answer](self, question: "Callable[[Engine], Answer]") -> Answer:
        """What `question` returns of the engine, on the engine's thread between two steps. Raises EngineDeadError.

        An engine in another process takes only functions that can be imported there.
        """
        return await asyncio.wrap_future(self.backend.ask(question))

    async def reset_prefix_cache(self) -> None:
        """Forgets all that earlier requests left in the KV cache. Raises EngineDeadError."""
        await self.ask(_reset_prefix_cache)

    def shutdown(self) -> None:
        """Stops the engine; requests that are not finished get EngineDeadError. Calling it again does nothing."""
        self.backend.stop()

    # Places: at most `max_pending` requests are unfinished at a time, first come, first served.

    async def _take_place(self) -> None:
        with self._lock:
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
        with self._lock:
            while self._queue:
                turn = self._queue.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._pending -= 1

    # What the engine tells, on a thread of its own.

    def _deliver(self, news: News) -> None:
        """Hands outputs to their event loops, waking each loop once."""
        woken = []
        with self._lock:
            for number, output in news.outputs:  # one that is finished waits for nothing more, though its reader may be slow
                stream = self._streams.pop(number, None) if output.finished else self._streams.get(number)
                if stream is not None:
                    stream.output = output
                    woken.append(stream)
            self._owed = time.monotonic() if self._streams else None
        _wake(woken)
        if self.on_step is not None:
            for tokens in news.step_tokens:
                self.on_step(tokens)

    def _end(self, error: EngineDeadError) -> None:
        with self._lock:
            streams, self._streams, self._owed = self._streams, {}, None
        for stream in streams.values():
            stream.error = error
        _wake(streams.values())


def _reset_prefix_cache(engine: "Engine") -> None:
    engine.reset_prefix_cache()


def _wake(streams: Iterable[_Stream]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, streams in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: whoever read there has gone
            loop.call_soon_threadsafe(lambda streams=streams: [stream.wake() for stream in streams])
