"""Records of what a scheduler was told and what it planned, and their replay.

A record is JSON lines. The first is a header: the format's version, the SchedulerConfig, the number of pages. Each other one is
a call, in order: `["add", ...]`, `["finish", id]`, `["retire", id]`, `["name_pages", id, names]`, `["reset"]`, `["complete",
plan number]`, and `["plan", scheduled, copies, now]` for each plan made (`now`: the moment, in seconds); with host memory
(version 3) the header has its pages, and each plan its saves and fetches at the end. The scheduler being
pure, the same calls give the same plans: whatever happened in production can be looked at again, and a change to the scheduler
held against it.
"""

import dataclasses
import json
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from jaxllm.errors import ConfigError, JaxLLMError, RequestError
from jaxllm.serving.host_tier import TieredPool
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.scheduler import Scheduler, SchedulerConfig, StepPlan

VERSION, HOST_VERSION = 2, 3


class ReplayError(JaxLLMError):
    """A record was replayed, and a plan came out different."""


class PlanWriter:
    """Plans as lists: of each sequence its id, slot, start, count, samples, num_tokens, admitted, and how many of the pages
    that it had in its last plan it still has, and those that are new."""

    def __init__(self, tiered: bool):
        self._pages: dict[int, tuple[int, ...]] = {}
        self._tiered = tiered

    def write(self, plan: StepPlan, now: float) -> list[Any]:
        rows = []
        for s in plan.scheduled:
            before = self._pages.get(s.sequence.id, ())
            kept = len(before)
            if s.pages[:kept] != before:
                kept = next(i for i, page in enumerate(before) if i == len(s.pages) or page != s.pages[i])
            self._pages[s.sequence.id] = s.pages
            row = [s.sequence.id, s.sequence.slot, s.start, s.count, int(s.samples), s.num_tokens, int(s.admitted), kept]
            rows.append([*row, list(s.pages[kept:])])
        moved = [[list(pair) for pair in pairs] for pairs in (plan.saves, plan.fetches)] if self._tiered else []
        return ["plan", rows, [list(pair) for pair in plan.copies], now, *moved]

    def forget(self, id: int) -> None:
        self._pages.pop(id, None)


class RecordingScheduler(Scheduler):
    """A scheduler that writes down what it is told and what it plans. Written out whenever there is nothing to do, and at the end."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, file: TextIO):
        super().__init__(config, pool)
        self._file, self._writer = file, PlanWriter(self.tiered)
        self._num_plans = 0
        self._open: dict[int, StepPlan] = {}  # plans that have not been completed, by number
        self.close = weakref.finalize(self, file.close)  # at the interpreter's end at the latest
        host = {"host_pages": pool.host_pages} if self.tiered else {}
        version = HOST_VERSION if self.tiered else VERSION
        self._write({"jaxllm_record": version, "config": dataclasses.asdict(config), "num_pages": pool.num_pages, **host})

    def add(self, id: int, num_prompt: int, max_tokens: int, page_names: Iterable[bytes] = (), **options: Any) -> None:
        names = list(page_names)
        super().add(id, num_prompt, max_tokens, names, **options)  # one that is refused changes nothing
        self._write(["add", id, num_prompt, max_tokens, _hex(names), options])

    def finish(self, id: int) -> None:
        self._write(["finish", id])
        self._writer.forget(id)
        super().finish(id)

    def retire(self, id: int) -> None:
        self._write(["retire", id])
        super().retire(id)

    def name_pages(self, id: int, names: Iterable[bytes]) -> None:
        names = list(names)
        self._write(["name_pages", id, _hex(names)])
        super().name_pages(id, names)

    def reset_prefix_cache(self) -> None:
        self._write(["reset"])
        super().reset_prefix_cache()

    def complete(self, plan: StepPlan) -> None:
        number = next(n for n, p in self._open.items() if p is plan)
        del self._open[number]
        self._write(["complete", number])
        super().complete(plan)

    def schedule(self, now: float = 0.0) -> StepPlan:
        plan = super().schedule(now)
        self._write(self._writer.write(plan, now))
        if plan.scheduled:
            self._open[self._num_plans] = plan
        else:
            self._file.flush()
        self._num_plans += 1
        return plan

    def _write(self, entry: Any) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")


def open_record(path: str) -> TextIO:
    """The file to record to, emptied. Raises ConfigError."""
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"record: cannot write {path} ({error.strerror})") from error


@dataclass(frozen=True)
class Replayed:
    """What a record held: its plans, all derived again; `truncated`: its last line was cut off, and left out."""

    plans: int
    calls: int
    truncated: bool


def replay(path: str) -> Replayed:
    """Tells a scheduler all that a record says. Raises ReplayError at the first plan that differs, ConfigError if the file is broken."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _Replay(path).run(file)
    except OSError as error:
        raise ConfigError(f"replay: cannot read {path} ({error.strerror})") from error


class _Replay:
    def __init__(self, path: str):
        self._path, self._line = path, 0
        self._open: dict[int, StepPlan] = {}
        self._num_plans = 0
        self._writer: PlanWriter
        self._scheduler: Scheduler

    def run(self, file: TextIO) -> Replayed:
        lines, truncated = _entries(file), False
        for self._line, entry, problem in lines:
            if problem is not None:
                if self._line == 1 or next(lines, None) is not None:
                    raise self._broken(problem)
                truncated = True
                break
            try:
                self._start(entry) if self._line == 1 else self._call(*entry)
            except RequestError as error:
                raise ReplayError(f"{self._where()}: the scheduler accepted this then, and refuses it now: {error}") from error
            except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, AssertionError) as error:
                if isinstance(error, JaxLLMError):
                    raise
                raise self._broken(f"cannot be replayed ({type(error).__name__}: {error})") from error
        if self._line == 0:
            raise ConfigError(f"{self._path} is empty: it is no record")
        return Replayed(self._num_plans, self._line - truncated - 1, truncated)

    def _start(self, header: Any) -> None:
        if not isinstance(header, dict) or "jaxllm_record" not in header:
            raise self._broken("it is no record's header: was this file made with --record?")
        if (version := header["jaxllm_record"]) not in (VERSION, HOST_VERSION):
            raise self._broken(f"the record has version {version!r}, and this jaxllm reads versions {VERSION} and {HOST_VERSION}")
        tiered = version == HOST_VERSION
        pool = TieredPool(header["num_pages"], header["host_pages"]) if tiered else PagePool(header["num_pages"])
        self._scheduler, self._writer = Scheduler(SchedulerConfig(**header["config"]), pool), PlanWriter(tiered)

    def _call(self, name: str, *arguments: Any) -> None:
        if name == "plan":
            self._plan(["plan", *arguments])
        elif name == "add":
            *numbers, names, options = arguments
            self._scheduler.add(*numbers, _bytes(names), **options)
        elif name == "name_pages":
            self._scheduler.name_pages(arguments[0], _bytes(arguments[1]))
        elif name == "finish":
            self._writer.forget(*arguments)
            self._scheduler.finish(*arguments)
        elif name == "retire":
            self._scheduler.retire(*arguments)
        elif name == "reset":
            self._scheduler.reset_prefix_cache(*arguments)
        elif name == "complete":
            self._scheduler.complete(self._open.pop(*arguments))
        else:
            raise ValueError(f"there is no call {name!r}")

    def _plan(self, recorded: list[Any]) -> None:
        _, rows, copies, now, *moved = recorded
        plan = self._scheduler.schedule(now)
        _, ours, our_copies, _, *our_moved = self._writer.write(plan, now)
        for i in range(max(len(rows), len(ours))):
            then, now = (x[i] if i < len(x) else None for x in (rows, ours))
            if then != now:
                raise self._differs(f"sequence {i} of the step: {_in_words(then)} then, {_in_words(now)} now")
        if copies != our_copies:
            raise self._differs(f"pages copied (from, to): {copies} then, {our_copies} now")
        if moved != our_moved:
            raise self._differs(f"pages moved to host memory and back: {moved} then, {our_moved} now")
        if plan.scheduled:
            self._open[self._num_plans] = plan
        self._num_plans += 1

    def _where(self) -> str:
        return f"{self._path}, line {self._line}"

    def _broken(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._where()}: {problem}")

    def _differs(self, how: str) -> ReplayError:
        return ReplayError(f"{self._where()}: plan {self._num_plans} differs (the {self._num_plans} before it are identical). {how}")


def _entries(file: TextIO) -> Iterator[tuple[int, Any, str | None]]:
    """Each line's number and what it holds, or what is wrong with it."""
    for number, line in enumerate(file, 1):
        try:
            yield number, json.loads(line), None
        except ValueError:
            yield number, None, f"it is not JSON: {line.strip()!r:.80}"


def _in_words(row: list[Any] | None) -> str:
    if not isinstance(row, list) or len(row) != 9:
        return "nothing" if row is None else f"{row}"
    id, slot, start, count, samples, num_tokens, admitted, kept, pages = row
    return (
        f"id {id}, slot {slot}, tokens {start} to {start + count} of {num_tokens}{', draws' if samples else ''}"
        f"{', newly admitted' if admitted else ''}, {kept} pages as before and {pages}"
    )


def _hex(names: list[bytes]) -> list[str]:
    return [name.hex() for name in names]


def _bytes(names: list[str]) -> list[bytes]:
    return [bytes.fromhex(name) for name in names]
