"""An engine and the one thread that touches it."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxllm.errors import JaxLLMError
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.engine import Engine
from jaxllm.serving.logits import LogitsProcessor
from jaxllm.serving.news import EngineDeadError, EngineFigures, Listener, News, facts_of, fail, figures_of
from jaxllm.serving.request import RequestOutput
from jaxllm.serving.sampling_params import SamplingParams
from jaxllm.serving.structured import Matcher


class EngineThread:
    """Takes requests from any thread; `EngineProcess` does the same for an engine in another process."""

    restarts = 0

    def __init__(self, config: EngineConfig, listener: Listener, processors: Mapping[str, LogitsProcessor] | None = None):
        self.engine = Engine(config, processors)
        self.facts = facts_of(self.engine)
        self._listener = listener
        self._names: dict[int, str] = {}  # of the engine's thread alone, as is its inverse
        self._numbers: dict[str, int] = {}
        self._step_tokens: list[int] = []
        self.engine.on_step = self._step_tokens.append
        self._inbox: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._stopping = False
        self._wake = threading.Condition()
        self.dead: EngineDeadError | None = None
        self._grammars = ThreadPoolExecutor(4, "jaxllm-grammar")
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        self._thread.start()

    @property
    def figures(self) -> EngineFigures:
        """Of this moment; counts may be a step old."""
        return figures_of(self.engine)

    def add(
        self, number: int, request_id: str, ids: Sequence[int], params: SamplingParams, text: str | None, labels: Mapping[str, str]
    ) -> Future:
        """Queues a request, whose outputs come under `number`. The future has RequestError or EngineDeadError if it cannot be served;
        cancelling it before it is done, or `abort` after that, ends the request."""
        done: Future = Future()
        add = lambda matcher: lambda: self._add(number, request_id, ids, params, text, labels, matcher)
        if params.structured_outputs is None:
            self._post(done, add(None))
        else:
            try:
                self._grammars.submit(self._compile, done, params, add)
            except RuntimeError:  # the engine has ended, and this with it
                self._post(done, add(None))
        return done

    def abort(self, number: int) -> None:
        """Ends a request; one that is unknown, or has ended, is ignored."""
        self._post(Future(), lambda: self._abort(number))

    def ask(self, question: Callable[[Engine], Any]) -> Future:
        """What `question` returns of the engine, on its thread between two steps."""
        done: Future = Future()
        self._post(done, lambda: question(self.engine))
        return done

    def stop(self) -> None:
        """Ends the engine and waits for it. Calling it again does nothing."""
        self._post(Future(), self._stop)
        self._thread.join()

    def _post(self, done: Future, action: Callable[[], Any]) -> None:
        """Has the engine's thread do something between two steps; the future has what it returned or raised."""
        with self._wake:
            dead = self.dead
            if dead is None:
                self._inbox.append((done, action))
                self._wake.notify()
        if dead is not None:
            fail(done, dead)

    def _compile(self, done: Future, params: SamplingParams, add: Callable[[Matcher | None], Callable[[], None]]) -> None:
        """Makes what structured output needs, which takes time, on a thread beside the engine's."""
        try:
            matcher = self.engine.matcher(params)
        except BaseException as error:
            fail(done, error)
        else:
            self._post(done, add(matcher))

    # The engine's thread.

    def _add(self, number: int, request_id: str, ids, params, text, labels, matcher: Matcher | None) -> None:
        self.engine.add_request(ids, params, prompt=text, request_id=request_id, matcher=matcher, **labels)
        self._names[number], self._numbers[request_id] = request_id, number

    def _abort(self, number: int) -> None:
        if (request_id := self._forget(number)) is not None:
            self.engine.abort(request_id)

    def _forget(self, number: int) -> str | None:
        request_id = self._names.pop(number, None)
        if request_id is not None:
            del self._numbers[request_id]
        return request_id

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
                self._tell(self.engine.step() if self.engine.has_work else [])
        except BaseException as error:
            self._die(error)

    def _act(self, done: Future, action: Callable[[], Any]) -> None:
        if not done.set_running_or_notify_cancel():
            return  # whoever asked was cancelled before its turn came
        try:
            result = action()
        except BaseException as error:
            done.set_exception(error)
            if not isinstance(error, JaxLLMError):  # a bad request is its sender's alone
                raise
        else:
            done.set_result(result)

    def _tell(self, outputs: list[RequestOutput]) -> None:
        told = [(self._numbers[output.request_id], output) for output in outputs if output.request_id in self._numbers]
        for number, output in told:
            if output.finished:
                self._forget(number)
        steps = self._step_tokens.copy()
        self._step_tokens.clear()
        self._listener.news(News(told, steps))

    def _die(self, cause: BaseException | None) -> None:
        error = EngineDeadError("the engine was shut down" if cause is None else f"the engine's thread ended: {cause!r}")
        error.__cause__ = cause
        with self._wake:
            self.dead, actions, self._inbox = error, self._inbox, deque()
        self._listener.end(error)
        for done, _ in actions:
            fail(done, error)
        self._grammars.shutdown(wait=False)
        self.engine.close()  # when everyone has been told: it may fail on a broken device
