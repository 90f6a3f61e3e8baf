"""How far a long job has come, for whoever looks at a terminal."""

import sys
import time


class ProgressLine:
    """`progress(done, of)`: a line on standard error that is written over, if that is a terminal and it takes more than a second."""

    def __init__(self, doing: str, what: str):
        self._doing, self._what = doing, what
        self._start, self._shown = time.monotonic(), False

    def __call__(self, done: int, of: int) -> None:
        elapsed = time.monotonic() - self._start
        if not sys.stderr.isatty() or (elapsed < 1 and not self._shown):
            return
        self._shown = True
        bar = "#" * (30 * done // of)
        end = "\n" if done == of else ""
        sys.stderr.write(f"\r{self._doing} [{bar:<30}] {done}/{of} {self._what}, {elapsed:.0f} s{end}")
        sys.stderr.flush()
