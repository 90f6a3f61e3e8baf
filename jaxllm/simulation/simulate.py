"""The loop that drives the real scheduler without a chip: the engine's own (`serving/engine.py`), with a clock that jumps.

A plan is made when the step before it begins, as in the engine; what a step has drawn is read when it ends. Runs of steps that
differ in nothing but their number are done at once (`serving/repeat.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.policies import with_profile
from jaxllm.serving.repeat import can_repeat, most_repeats, repeat
from jaxllm.serving.scheduler import Scheduler, SchedulerConfig, Sequence, StepPlan
from jaxllm.simulation.cost import CostModel
from jaxllm.simulation.tier import Swap, SwappingScheduler
from jaxllm.simulation.traces import Trace

_OWN = 1 << 24  # names of a request's own pages are that far apart


@dataclass
class Outcome:
    """What became of a trace. Times in seconds; [N] arrays are by request.

    `gaps` [M]: times between a request's tokens, each as often as `gap_counts` says.
    """

    trace: Trace
    first_token: np.ndarray
    finished: np.ndarray
    preemptions: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    gaps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gap_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    swapped_in_bytes: int = 0
    swapped_out_bytes: int = 0
    swap_s: float = 0.0
    exposed_swap_s: float = 0.0


def limits_of(cost: CostModel, *, max_num_seqs: int, max_num_batched_tokens: int, page_size: int, policy: str, options=None):
    """The scheduler's limits on a machine, and the pages of its pool. Of the policy's constants, those that are the machine's and are not
    given follow from its costs, as the engine's do from measured steps."""
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        max_model_len=cost.max_model_len,
        page_size=page_size,
        policy=policy,
        policy_options=with_profile(policy, options or {}, cost.step_s, cost.token_s),
    )
    return config, cost.kv_tokens // page_size + 1


def simulate(
    trace: Trace,
    cost: CostModel,
    limits: SchedulerConfig,
    num_pages: int,
    *,
    tell_lengths: bool = False,
    at_once: bool = True,
    swap: Swap = "recompute",
    host_bytes: float = float("inf"),
    watch: Callable[[float, float, StepPlan], None] | None = None,
) -> Outcome:
    """Runs a trace to its end. `tell_lengths`: the scheduler knows how long each output will be (for an oracle), not only that it
    ends before max_model_len. `at_once=False`: each step for itself. `watch(begin, end, plan)`: called for each plan.
    `swap`: what becomes of the pages of those who give up their places (`tier.py`), in host memory of `host_bytes`.

    Raises ConfigError for a request that can never run.
    """
    return _Simulation(trace, cost, limits, num_pages, tell_lengths, at_once, watch, swap, host_bytes).run()


class _Simulation:
    def __init__(self, trace, cost, limits, num_pages, tell_lengths, at_once, watch, swap, host_bytes):
        self.trace, self.cost, self.limits, self.watch = trace, cost, limits, watch
        self.at_once = at_once and watch is None
        self.tier = None if swap == "recompute" else SwappingScheduler(limits, num_pages, cost, swap, host_bytes)
        self.scheduler = self.tier or Scheduler(limits, PagePool(num_pages))
        self.tell_lengths = tell_lengths
        n = len(trace)
        longest = trace.prompts + trace.outputs
        if (worst := int(longest.max())) > min(limits.max_model_len, (num_pages - 1) * limits.page_size):
            raise ConfigError(
                f"request {int(longest.argmax()) + 1} has {worst} tokens: the model takes {limits.max_model_len} and the KV cache "
                f"{(num_pages - 1) * limits.page_size}"
            )
        self.arrivals, self.prompts, self.outputs = trace.arrivals.tolist(), trace.prompts.tolist(), trace.outputs.tolist()
        self.left = list(self.outputs)  # tokens to be read
        self.last = [0.0] * n  # when each request's newest token was read
        self.first, self.finished = [0.0] * n, [0.0] * n
        self.gaps: list[float] = []
        self.gap_counts: list[int] = []
        self.recomputed = self.cached = self.steps = 0
        self.busy = 0.0

    def run(self) -> Outcome:
        scheduler, arrivals, cost = self.scheduler, self.arrivals, self.cost
        in_flight: deque[tuple[StepPlan, float]] = deque()
        now = device_free = 0.0
        coming, n = 0, len(arrivals)
        while coming < n or scheduler.has_work:
            while coming < n and arrivals[coming] <= now:
                self.add(coming)
                coming += 1
            plan = scheduler.schedule(now)
            if plan.scheduled:
                begin = max(now, device_free) if self.tier is None else self.tier.begin(plan, now, device_free)
                seconds = cost.seconds(plan)
                device_free = begin + seconds
                self.busy += seconds
                self.steps += 1
                if self.tier is not None:
                    self.tier.meanwhile(begin, device_free)
                if self.watch is not None:
                    self.watch(begin, device_free, plan)
                in_flight.append((plan, device_free))
            if in_flight and (len(in_flight) > 1 or not plan.scheduled):
                done, now = in_flight.popleft()
                ended = self.read(done, now)
                if self.at_once and in_flight and not ended and can_repeat(scheduler, plan):
                    until = min(arrivals[coming] if coming < n else float("inf"), scheduler.next_review)
                    if (times := self.repeats(plan, now, device_free, until)) > 0:
                        repeat(scheduler, plan, times)
                        now, device_free = self.read_repeated(plan, times, device_free, now)
                        in_flight.clear()
                        in_flight.append((plan, device_free))
            elif not plan.scheduled:
                if coming == n:
                    raise RuntimeError("the scheduler has stalled: this is a bug in jaxllm, please report it")
                now = arrivals[coming]
        return Outcome(
            self.trace,
            np.array(self.first),
            np.array(self.finished),
            scheduler.num_preemptions,
            self.recomputed,
            self.cached,
            self.steps,
            self.busy,
            np.array(self.gaps),
            np.array(self.gap_counts, np.int64),
            **({} if self.tier is None else self.tier.figures()),
        )

    def add(self, i: int) -> None:
        trace, prompt = self.trace, self.prompts[i]
        most = self.outputs[i] if self.tell_lengths else self.limits.max_model_len - prompt
        self.scheduler.add(
            i,
            prompt,
            most,
            self.names(i, prompt),
            priority=trace.priorities[i] if trace.priorities is not None else 0,
            tenant=trace.tenants[i] if trace.tenants is not None else "",
            now=self.arrivals[i],
        )

    def names(self, i: int, tokens: int) -> list[int]:
        """Of the full pages of a request's first tokens: by its blocks as far as those go, then its own."""
        size, trace = self.limits.page_size, self.trace
        own = range(_OWN * (i + 1), _OWN * (i + 1) + tokens // size)
        if trace.blocks is None or trace.block % size:
            return own
        pages = trace.block // size
        shared = [block * pages + j for block in trace.blocks[i] for j in range(pages)][: self.prompts[i] // size]
        return [-1 - name for name in shared][: tokens // size] + list(own[len(shared) :])

    def read(self, plan: StepPlan, now: float) -> bool:
        """Reads what a plan has drawn; returns whether any request has ended."""
        scheduler, left, last, outputs, size = self.scheduler, self.left, self.last, self.outputs, self.limits.page_size
        scheduler.complete(plan)
        gaps: dict[float, int] = {}
        ended = False
        for s in plan.scheduled:
            sequence = s.sequence
            if s.count > 1 and sequence.preemptions:
                self.recomputed += s.count
            if not s.samples or sequence.ended:
                continue
            i = sequence.id
            remaining = left[i] = left[i] - 1
            read = outputs[i] - remaining
            if read == 1:
                self.first[i] = now
                self.cached += sequence.num_cached
            else:
                gap = now - last[i]
                gaps[gap] = gaps.get(gap, 0) + 1
            last[i] = now
            if remaining == 0:
                self.finished[i] = now
                scheduler.finish(i)
                ended = True
            elif (self.prompts[i] + read) % size == 0:
                self.name(sequence, read)
        self.gaps += gaps
        self.gap_counts += gaps.values()
        return ended

    def name(self, sequence: Sequence, read: int) -> None:
        """Names the pages that a request has filled since it was last told."""
        i = sequence.id
        first, full = len(sequence.page_names), (self.prompts[i] + read) // self.limits.page_size
        if full > first:
            self.scheduler.name_pages(i, range(_OWN * (i + 1) + first, _OWN * (i + 1) + full))

    def repeats(self, plan: StepPlan, now: float, device_free: float, until: float) -> int:
        """How many more plans like `plan`, which ends at `device_free`, are made before `until` with nothing ending."""
        if now >= until:
            return 0
        left = self.left
        times = min([left[s.sequence.id] for s in plan.scheduled]) - 1
        if times > 1 and device_free < until:
            # The i-th is made when the one two before it ends: device_free for the second.
            first, more = self.cost.repeated(plan)
            while times > 2 and device_free + _sum(first, more, times - 2) >= until:
                times = max(2, min(times - 1, 2 + int((until - device_free) / (first + more * (times - 3) / 2))))
        else:
            times = min(times, 1)
        return most_repeats(self.scheduler, plan, times) if times > 0 else 0

    def read_repeated(self, plan: StepPlan, times: int, device_free: float, now: float) -> tuple[float, float]:
        """Reads `plan` and all but the last of its repetitions; returns when that is, and when the last ends."""
        first, more = self.cost.repeated(plan)
        read_at = device_free + _sum(first, more, times - 1)
        end = device_free + _sum(first, more, times)
        self.busy += end - device_free
        self.steps += times
        left, last, outputs, usual = self.left, self.last, self.outputs, 0
        for s in plan.scheduled:
            i = s.sequence.id
            left[i] -= times
            read = outputs[i] - left[i]
            if last[i] == now:
                usual += times
            else:
                self.gaps.append((read_at - last[i]) / times)
                self.gap_counts.append(times)
            last[i] = read_at
            if (self.prompts[i] + read) % self.limits.page_size < times:
                self.name(s.sequence, read)
        self.gaps.append((read_at - now) / times)
        self.gap_counts.append(usual)
        return read_at, end


def _sum(first: float, more: float, n: int) -> float:
    """first + (first + more) + ... of n terms."""
    return n * first + more * n * (n - 1) / 2
