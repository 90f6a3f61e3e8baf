"""Compiling the closed set of programs at start, on threads of their own."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from typing import Any

from jaxllm.host_memory import trim


class WarmUp:
    """Compiles `keys` in their order on `workers` threads, with `compile_(key)`, a bound method whose object it does not keep alive.

    It stops when it is closed, when that object is gone, or when the main thread ends: a program that is being compiled is
    finished then, and those after it are dropped.
    """

    def __init__(self, keys: Sequence[Hashable], compile_: Callable[[Any], Any], workers: int):
        self._todo, self._lock = deque(keys), threading.Lock()
        self._futures: dict[Hashable, Future] = {key: Future() for key in keys}
        self._compile = weakref.WeakMethod(compile_)
        for i in range(min(workers, len(keys))):
            threading.Thread(target=self._work, name=f"jaxllm-compile-{i}").start()

    def wait(self, keys: Sequence[Hashable] | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Until they (None: all) are compiled, telling `progress(done, of)`; raises what the compiler raised."""
        keys = list(self._futures) if keys is None else keys
        try:
            for done, future in enumerate(as_completed([self._futures[key] for key in keys]), 1):
                future.result()
                if progress is not None:
                    progress(done, len(keys))
        except BaseException:  # an interrupt, too: nothing goes on behind the caller's back
            self.close()
            raise

    def ready(self, key: Hashable) -> bool:
        """Whether `get` has it at once."""
        future = self._futures.get(key)
        return future is not None and future.done() and not future.cancelled()

    def get(self, key: Hashable) -> Any | None:
        """The program, waited for if it is on its way; None if it was never asked for or has been dropped."""
        try:
            return self._futures[key].result() if key in self._futures else None
        except CancelledError:
            return None

    def close(self) -> None:
        """Drops what has not begun."""
        with self._lock:
            while self._todo:
                future = self._futures[self._todo.popleft()]
                future.cancel()
                future.set_running_or_notify_cancel()  # wakes whoever waits for it

    def _work(self) -> None:
        while True:
            compile_ = self._compile()
            if compile_ is None or not threading.main_thread().is_alive():
                return self.close()
            with self._lock:
                if not self._todo:
                    return
                future = self._futures[key := self._todo.popleft()]
            try:
                future.set_result(compile_(key))
            except BaseException as error:
                future.set_exception(error)
            del compile_
            trim()
