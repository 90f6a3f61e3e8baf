"""Many runs of the simulator, in processes of their own; what is known of a run is kept in a file, so that none is made twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jaxllm.config import unknown
from jaxllm.errors import ConfigError, DataError
from jaxllm.serving.policies import POLICIES
from jaxllm.simulation.bounds import least_jct
from jaxllm.simulation.cost import cost_model
from jaxllm.simulation.load import saturation
from jaxllm.simulation.metrics import figures
from jaxllm.simulation.simulate import limits_of, simulate
from jaxllm.simulation.traces import Trace, read_trace
from jaxllm.simulation.workloads import WORKLOADS, Arrivals, draw_workload

# What figures depend on, beside the policy's own file.
_SERVING = ("host_tier", "kv_cache", "preemption", "repeat", "scheduler", "policies/__init__", "policies/base", "policies/outputs")
_SIMULATION = ("bounds", "cost", "load", "metrics", "simulate", "tier", "traces", "workloads")


@dataclass(frozen=True)
class Requests:
    """`number` requests from a seed: drawn (`name`: of a workload), or another stretch of a trace (`name`: its file) for each seed."""

    name: str
    machine: str
    number: int

    @property
    def label(self) -> str:
        return Path(self.name).stem

    @property
    def is_trace(self) -> bool:
        return Path(self.name).suffix != ""

    def check(self, seeds: int) -> None:
        """Raises ConfigError or DataError."""
        if not self.is_trace and self.name not in WORKLOADS:
            raise ConfigError(unknown(self.name, list(WORKLOADS), noun="workload"))
        if self.is_trace and (has := len(_whole(self.name, self.machine))) < seeds * self.number:
            raise ConfigError(f"{self.name} has {has} requests, fewer than seeds * num_requests = {seeds * self.number}")

    def draw(self, seed: int) -> Trace:
        return _draw(self, seed)


@lru_cache(4)
def _whole(name: str, machine: str) -> Trace:
    return read_trace(name).fitting(cost_model(machine).max_model_len)[0]


@lru_cache(32)
def _draw(requests: Requests, seed: int) -> Trace:
    if requests.is_trace:
        return _whole(requests.name, requests.machine).part(seed * requests.number, requests.number)
    longest = cost_model(requests.machine).max_model_len
    return draw_workload(requests.name, requests.number, Arrivals(), seed=seed, max_model_len=longest)


@dataclass(frozen=True)
class Run:
    """One run of requests; without a `rate`: what fcfs serves of them at most (`saturation`); without a policy: the least mean JCT that
    any could have (`least_jct`)."""

    requests: Requests
    seed: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    rate: float | None = None
    policy: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    tell_lengths: bool = False

    def result(self) -> dict[str, float]:
        machine, trace = cost_model(self.requests.machine), self.requests.draw(self.seed)
        limits = {name: getattr(self, name) for name in ("max_num_seqs", "max_num_batched_tokens", "page_size")}
        if self.rate is None:
            return {"saturation": saturation(trace, machine, **limits)}
        trace = trace.at_rate(self.rate)
        if self.policy is None:
            return {"mean_jct_s": least_jct(trace, machine, self.max_num_seqs)}
        settings = limits_of(machine, policy=self.policy, options=dict(self.options), **limits)
        return figures(simulate(trace, machine, *settings, tell_lengths=self.tell_lengths))

    def key(self) -> str:
        """Of all that its result depends on: what it is of, and the programs that make it."""
        here = Path(__file__).parent
        files = [here / f"{name}.py" for name in _SIMULATION] + [here.parent / "serving" / f"{name}.py" for name in _SERVING]
        files.append(Path(sys.modules[POLICIES[self.policy or "fcfs"].__module__].__file__))
        what = asdict(self)
        if self.requests.is_trace:
            path = Path(self.requests.name)
            what["requests"]["name"] = (path.name, _digest_of(path, path.stat().st_mtime_ns))
        return blake2b(repr((what, [_digest_of(file) for file in files])).encode(), digest_size=16).hexdigest()


@lru_cache(64)
def _digest_of(path: Path, changed: int = 0) -> str:
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _result(run: Run) -> dict[str, float]:
    return run.result()


class Results:
    """Results of runs, made as they are asked for; those in `path`, a file of JSON lines, are not made anew."""

    def __init__(self, executor: Executor | None, path: str | Path | None):
        self._executor, self._path, self._known = executor, None if path is None else Path(path), {}
        if self._path is not None and self._path.exists():
            for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = row["result"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}, is no result of a run: delete the line") from error

    def of(self, runs: Iterable[Run], done: Callable[[Run], None] = lambda run: None) -> dict[Run, dict[str, float]]:
        """Of each run. `done`: called for those that had to be made."""
        runs = list(runs)
        missing = [run for run in runs if run.key() not in self._known]
        for run, result in self._make(missing):
            key = run.key()
            self._known[key] = result
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "run": asdict(run), "result": result}) + "\n")
            done(run)
        return {run: self._known[run.key()] for run in runs}

    def _make(self, runs: list[Run]) -> Iterator[tuple[Run, dict[str, float]]]:
        if self._executor is None:
            yield from ((run, run.result()) for run in runs)
        else:
            futures = {self._executor.submit(_result, run): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result()


@contextmanager
def results(processes: int = 1, path: str | Path | None = None) -> Iterator[Results]:
    """Makes runs in as many processes; 1: in this one."""
    if processes == 1:
        yield Results(None, path)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as executor:
        try:
            yield Results(executor, path)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
