"""A trace on the real engine, measured as the simulator would: requests come when the trace says, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.simulation.simulate import Outcome
from jaxllm.simulation.traces import Trace

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine
    from jaxllm.serving.scheduler import StepPlan


def serve(engine: Engine, trace: Trace, watch: Callable[[StepPlan, float], None] | None = None) -> Outcome:
    """Serves a trace: prompts are drawn at random, and begin alike where the trace says so; each request is ended after as many tokens as
    it has in the trace, of which the scheduler knows nothing beforehand. `watch(plan, seconds)`: called for each step that followed
    upon another without a pause.

    Of the time that pages take to host memory and back (`swap_s`), what is not hidden (`exposed_swap_s`) is what the host's thread did
    while the device had nothing else to do, at most, and what the device's own programs take for it.

    Raises ConfigError for a request that does not fit.
    """
    return _Serve(engine, trace, watch).run()


class _Serve:
    def __init__(self, engine, trace, watch):
        self.engine, self.trace, self.watch = engine, trace, watch
        limits, pool = engine.limits, engine.pool
        room = min(limits.max_model_len, pool.capacity * limits.page_size)
        longest = trace.prompts + trace.outputs
        if int(longest.max()) > room:
            raise ConfigError(f"request {int(longest.argmax()) + 1} has {int(longest.max())} tokens, and the engine takes {room}")
        n = len(trace)
        self.read_tokens, self.last = [0] * n, [0.0] * n
        self.first, self.finished = np.zeros(n), np.zeros(n)
        self.gaps: list[float] = []
        self.recomputed = self.cached = self.steps = 0
        self.busy, self.read_at = 0.0, None

    def run(self) -> Outcome:
        engine, trace = self.engine, self.trace
        prompts = [self._prompt(i) for i in range(len(trace))]
        preemptions, host = engine.scheduler.num_preemptions, engine.runner.host_pages
        if host is not None:
            host.stats = type(host.stats)()
        engine.on_read = self._read
        self.start = time.perf_counter()
        coming = 0
        try:
            while coming < len(trace) or engine.has_work:
                now = time.perf_counter() - self.start
                while coming < len(trace) and trace.arrivals[coming] <= now:
                    self._add(coming, prompts[coming])
                    coming += 1
                if not engine.has_work:
                    self.read_at = None
                    time.sleep(max(0.0, trace.arrivals[coming] - now))
                    continue
                for output in engine.step():
                    self._take(int(output.request_id), output)
        finally:
            engine.on_read = None
            engine.drain()
        counts = np.ones(len(self.gaps), np.int64)
        return Outcome(
            trace,
            self.first,
            self.finished,
            engine.scheduler.num_preemptions - preemptions,
            self.recomputed,
            self.cached,
            self.steps,
            self.busy,
            np.array(self.gaps),
            counts,
            **({} if host is None else self._swapped(host)),
        )

    def _add(self, i: int, prompt: list[int]) -> None:
        from jaxllm.serving.request import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=self.engine.limits.max_model_len - len(prompt), ignore_eos=True)
        tenant = self.trace.tenants[i] if self.trace.tenants is not None else ""
        self.engine.add_request(prompt, params, request_id=str(i), tenant=tenant)

    def _prompt(self, i: int) -> list[int]:
        """Random tokens; those of a named block are the same wherever it comes up."""
        trace, vocab = self.trace, self.engine.vocab_size
        tokens: list[int] = []
        for name in trace.blocks[i] if trace.blocks is not None else ():
            tokens += np.random.default_rng([1, name]).integers(0, vocab, trace.block).tolist()
        tokens = tokens[: trace.prompts[i]]
        return tokens + np.random.default_rng([2, i]).integers(0, vocab, int(trace.prompts[i]) - len(tokens)).tolist()

    def _take(self, i: int, output) -> None:
        now, read = time.perf_counter() - self.start, len(output.outputs[0].token_ids)
        if read == 1:
            self.first[i] = now
            self.cached += output.num_cached_tokens or 0
        else:
            self.gaps.append(now - self.last[i])
        self.last[i] = now
        if read == self.trace.outputs[i]:
            self.finished[i] = now
            self.engine.abort(output.request_id)

    def _read(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        self.steps += 1
        self.recomputed += sum(s.count for s in plan.scheduled if s.count > 1 and s.sequence.preemptions)
        if self.read_at is not None:
            self.busy += now - self.read_at
            if self.watch is not None:
                self.watch(plan, now - self.read_at)
        self.read_at = now

    def _swapped(self, host) -> dict[str, float]:
        """Of `Outcome`, what was moved to host memory and back."""
        runner, stats = self.engine.runner, host.stats
        seconds, runner.state.kv_pages = host.device_s(lambda kind, size: runner._program((kind, size)), runner.state.kv_pages)
        return {
            "swapped_in_bytes": stats.fetched * host.page_bytes,
            "swapped_out_bytes": stats.saved * host.page_bytes,
            "swap_s": stats.host_s + seconds,
            "exposed_swap_s": stats.exposed_s + seconds,
        }
