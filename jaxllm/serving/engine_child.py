"""The process that an `EngineProcess` starts: an engine, and one end of a pipe. It ends when the other end does."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.logs import log_to_stderr
from jaxllm.serving.engine_thread import EngineThread
from jaxllm.serving.news import EngineDeadError, Listener, News
from jaxllm.serving.wire import OutputWriter


class EngineChild:
    """Does what comes over the pipe, and tells over it what the engine tells."""

    def __init__(self, connection: Connection):
        self._connection, self._sending = connection, threading.Lock()
        self._inbox: SimpleQueue[tuple] = SimpleQueue()
        self._adding: dict[int, Future] = {}
        self._writers: dict[int, OutputWriter] = {}
        # From the beginning, so that whoever started this can end it while it loads.
        threading.Thread(target=self._receive, name="jaxllm-pipe", daemon=True).start()

    def run(self) -> int:
        """Until it is told to stop, or the engine ends by itself. Returns the exit status."""
        config, log_level, paths = self._inbox.get()
        log_to_stderr(log_level)
        sys.path.extend(path for path in paths if path not in sys.path)  # what `ask` is given is found here as it was there
        try:
            self._engine = EngineThread(config, Listener(self._news, self._end))
        except BaseException as error:
            self._send("failed", _portable(error))
            if not isinstance(error, JaxLLMError):
                raise
            return 1
        gc.collect()
        gc.freeze()  # what is there now stays: collections, which hold up the device's next step, pass it over
        self._send("ready", self._engine.facts, self._engine.figures)
        while True:
            what, *rest = self._inbox.get()
            if what in ("stop", "ended"):
                self._engine.stop()
                return 0 if what == "stop" else 1
            getattr(self, f"_{what}")(*rest)

    def _add(self, ticket: int, number: int, request_id: str, ids, params, text, labels) -> None:
        self._writers[number] = OutputWriter(ids)
        self._adding[number] = added = self._engine.add(number, request_id, ids, params, text, labels)
        added.add_done_callback(lambda done: self._adding.pop(number, None))
        self._reply_when_done(ticket, added)

    def _abort(self, number: int) -> None:
        if (added := self._adding.get(number)) is not None:
            added.cancel()
        self._engine.abort(number)
        self._writers.pop(number, None)

    def _ask(self, ticket: int, question: bytes) -> None:
        try:
            asked = pickle.loads(question)
        except Exception as error:
            self._send("reply", ticket, ConfigError(f"the engine's process cannot import what it is asked: {error!r}"), None)
        else:
            self._reply_when_done(ticket, self._engine.ask(asked))

    def _reply_when_done(self, ticket: int, future: Future) -> None:
        def reply(done: Future) -> None:
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                return self._send("reply", ticket, _portable(error), None)
            try:
                self._send("reply", ticket, None, done.result())
            except Exception as failure:  # it does not pickle, of which nothing has been sent
                self._send("reply", ticket, ConfigError(f"the answer cannot leave the engine's process: {failure!r}"), None)

        future.add_done_callback(reply)

    # On the engine's thread.

    def _news(self, news: News) -> None:
        told = []
        for number, output in news.outputs:
            if (writer := self._writers.get(number)) is not None:  # else it has been aborted
                told.append((number, writer.news(output)))
                if output.finished:
                    self._writers.pop(number, None)
        self._send("news", told, news.step_tokens, self._engine.figures)

    def _end(self, error: EngineDeadError) -> None:
        self._send("end", str(error))
        self._inbox.put(("ended",))

    # On any.

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)  # there is nobody to serve any more

    def _receive(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)
        except BaseException:  # never alive without ears
            traceback.print_exc()
            os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same if it does not travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return EngineDeadError(repr(error))
    return error


def main() -> None:
    for name in (signal.SIGINT, signal.SIGTERM):  # they are for who started this, who says when it is time to end
        signal.signal(name, signal.SIG_IGN)
    status = 1
    try:
        status = EngineChild(Connection(int(sys.argv[1]))).run()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # not by way of the device's threads, which may be in the middle of something


if __name__ == "__main__":
    main()
