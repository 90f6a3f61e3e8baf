"""An engine in a process of its own, which is started again when it dies.

Clients, JSON and templates then never take the interpreter from the thread that drives the device; and what kills the engine (memory,
a driver, a signal) leaves the server standing, which says so and recovers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import jaxllm
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.news import EngineDeadError, EngineFacts, EngineFigures, Listener, News, fail
from jaxllm.serving.sampling_params import SamplingParams
from jaxllm.serving.wire import OutputReader

logger = logging.getLogger(__name__)

_TRIES = 5  # starts, of an engine that does not start, or lives no longer than:
_LIVED = 60.0  # s
_PATIENCE = 30.0  # s that an engine has to end when it is told to


class _Child:
    """A process, and our end of the pipe to it."""

    def __init__(self, config: EngineConfig):
        ours, theirs = socket.socketpair()
        paths = [str(Path(jaxllm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxllm.serving.engine_child", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # a terminal's Ctrl-C is for the server, which drains
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._poster = threading.Thread(target=self._post, name="jaxllm-engine-outbox", daemon=True)
        self._poster.start()
        self.send(config, logging.getLogger().getEffectiveLevel(), sys.path)

    def send(self, *message: Any) -> None:
        """Waits for nothing: an engine that does not read holds nobody up here. If it has died, nobody gets it."""
        self._outbox.put(bytes(ForkingPickler.dumps(message)))

    def _post(self) -> None:
        with contextlib.suppress(OSError):  # it has died: whoever listens to it will say so
            while (message := self._outbox.get()) is not None:
                self.connection.send_bytes(message)

    def ready(self) -> tuple[EngineFacts, EngineFigures]:
        """Waits until it can serve. Raises what it could not be made for, or EngineDeadError."""
        try:
            what, *rest = self.connection.recv()
        except (EOFError, OSError):
            raise EngineDeadError(f"the engine's process ended while it started: {self.end()}") from None
        except BaseException:  # Ctrl-C
            self.process.kill()
            raise
        if what == "failed":
            self.end()
            raise rest[0]
        return rest[0], rest[1]

    def end(self) -> str:
        """Waits for it to end, and says how it did."""
        try:
            status = self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._outbox.put(None)
        self._poster.join()
        self.connection.close()
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


class EngineProcess:
    """What `EngineThread` is, for an engine elsewhere. It loads while whoever made this does something else, until `wait`."""

    def __init__(self, config: EngineConfig, listener: Listener):
        self._config, self._listener = config, listener
        self._lock = threading.Lock()  # of what follows
        self._replies: dict[int, Future] = {}
        self._readers: dict[int, OutputReader] = {}
        self.dead: EngineDeadError | None = None
        self.restarts = 0  # of an engine that died
        self._tickets = itertools.count()
        self._stopping = threading.Event()
        self._child = _Child(config)

    def wait(self) -> None:
        """Until it can serve. Raises what it could not be made for, or EngineDeadError."""
        self.facts, self.figures = self._child.ready()
        self._thread = threading.Thread(target=self._watch, name="jaxllm-engine-pipe", daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """In place of `wait`."""
        self._child.process.kill()
        self._child.end()

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def add(
        self, number: int, request_id: str, ids: Sequence[int], params: SamplingParams, text: str | None, labels: Mapping[str, str]
    ) -> Future:
        """See `EngineThread.add`."""
        with self._lock:
            self._readers[number] = OutputReader(request_id, text, ids)
        return self._request("add", number, request_id, ids, params, text, labels)

    def abort(self, number: int) -> None:
        with self._lock:
            self._readers.pop(number, None)
            self._child.send("abort", number)

    def ask(self, question: Callable[[Any], Any]) -> Future:
        """See `EngineThread.ask`; question and answer travel by pickle, so that it must be a function of a module."""
        return self._request("ask", pickle.dumps(question))

    def stop(self) -> None:
        """Ends the engine and waits for it. Calling it again does nothing."""
        with self._lock:
            self._stopping.set()
            if self.dead is not None:  # it may be starting
                self._child.process.kill()
            self._child.send("stop")
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():  # it hangs
            self._child.process.kill()
            self._thread.join()

    def _request(self, what: str, *rest: Any) -> Future:
        done: Future = Future()
        with self._lock:
            dead, ticket = self.dead, next(self._tickets)
            if dead is None:
                self._replies[ticket] = done
                self._child.send(what, ticket, *rest)
        if dead is not None:
            fail(done, dead)
        return done

    # The thread that listens.

    def _watch(self) -> None:
        tries, why = 0, self._listen()
        while not self._stopping.is_set():
            if tries == _TRIES:
                return self._end(f"{why}; it did so {_TRIES} times in a row and is not started again: see the log, restart the server")
            tries += 1
            self._end(f"{why}; it is being started again (try {tries} of {_TRIES})")
            if self._stopping.wait(2 ** (tries - 2) if tries > 1 else 0):
                break
            if (why := self._start()) is None:
                began, why = time.monotonic(), self._listen()
                if time.monotonic() - began > _LIVED:
                    tries = 0
        self._end("the engine was shut down")

    def _start(self) -> str | None:
        """A new engine in place of the dead one. Returns what went wrong, if it did."""
        start = time.monotonic()
        try:
            self._child = _Child(replace(self._config, record=None))  # the first one's record stays as it is
            if self._stopping.is_set():  # `stop` may have looked before it was there
                self._child.process.kill()
            facts, figures = self._child.ready()
        except Exception as error:
            return str(error)
        with self._lock:
            self.facts, self.figures, self.dead = facts, figures, None
        self.restarts += 1
        logger.warning("the engine runs again, %.1f s after it was started", time.monotonic() - start)
        return None

    def _listen(self) -> str:
        """Until the engine has ended. Returns why."""
        self._last_words = None
        try:
            while True:
                what, *rest = self._child.connection.recv()
                getattr(self, f"_on_{what}")(*rest)
        except (EOFError, OSError):
            pass
        except Exception:  # those who wait would wait for ever
            logger.exception("the engine's news cannot be read: this is a bug in jaxllm, please report it")
            self._child.process.kill()
        how = self._child.end()
        return self._last_words or f"the engine's process ended: {how}"

    def _on_reply(self, ticket: int, error: BaseException | None, result: Any) -> None:
        with self._lock:
            done = self._replies.pop(ticket, None)
        if done is None:
            return
        if error is not None:
            fail(done, error)
        elif done.set_running_or_notify_cancel():
            done.set_result(result)

    def _on_news(self, told: list[tuple[int, Any]], step_tokens: list[int], figures: EngineFigures) -> None:
        outputs = []
        with self._lock:
            self.figures = figures
            for number, news in told:
                if (reader := self._readers.get(number)) is not None:
                    outputs.append((number, output := reader.output(news)))
                    if output.finished:
                        del self._readers[number]
        self._listener.news(News(outputs, step_tokens))

    def _on_end(self, why: str) -> None:
        self._last_words = why

    def _end(self, why: str) -> None:
        if not self._stopping.is_set():
            logger.error("%s", why)
        error = EngineDeadError(why)
        with self._lock:
            self.dead, replies, self._replies = error, self._replies, {}
            self._readers.clear()
        self._listener.end(error)
        for done in replies.values():
            fail(done, error)
