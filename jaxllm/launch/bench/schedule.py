"""`jaxllm bench schedule`: what deciding who runs costs."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from jaxllm.launch.command import Command

_STEP_S = 0.03  # by the scheduler's clock: each policy reviews its ranks as often as on a real device


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Measure the processor's time that the scheduler takes for a step: `schedule`, `complete`, and what comes and ends with it, under
    each policy, with as many running and waiting as the flags say. No model and no device.

    Outputs have 20 to 380 tokens, so that about one request of 200 ends in a step; for each that ends, another comes. With --json:
    `policies`: name -> median_ms, p99_ms, least_ms, running, waiting (sequences, at the end), preemptions.

    Example:

      jaxllm bench schedule --policy fcfs,adaptive --json
    """

    policy: str = "fcfs,priority,priority_preempt,mlfq,hrrn,sjf,srpt,vtc,adaptive"
    "Policies, by commas (docs/scheduling.md)."
    running: int = 256
    "Sequences that run at the same time."
    waiting: int = 1000
    "Sequences that wait."
    tenants: int = 10
    "That they are of."
    steps: int = 300
    "Steps that are measured, after as many that are not."

    def __post_init__(self) -> None:
        self.check_counts("running", "waiting", "tenants", "steps")


def run(config: Config) -> dict[str, Any]:
    policies = {}
    print(f"{'':18}{'median ms':>11}{'p99 ms':>11}{'least ms':>11}{'preempted':>11}")
    for name in (name.strip() for name in config.policy.split(",")):
        policies[name] = measured = _measure(config, name)
        print(f"{name:18}" + "".join(f"{measured[key]:11.3f}" for key in ("median_ms", "p99_ms", "least_ms")), end="")
        print(f"{measured['preemptions']:11}")
    return {"policies": policies, "running": config.running, "waiting": config.waiting, "steps": config.steps}


def _measure(config: Config, policy: str) -> dict[str, float]:
    load = _Load(config, policy)
    for _ in range(config.steps):
        load.step()
    before = load.scheduler.num_preemptions
    took = sorted(load.step() for _ in range(config.steps))
    return {
        "median_ms": 1e3 * took[len(took) // 2],
        "p99_ms": 1e3 * took[int(0.99 * (len(took) - 1))],
        "least_ms": 1e3 * took[0],
        "preemptions": load.scheduler.num_preemptions - before,
        "running": len(load.scheduler.running),
        "waiting": len(load.scheduler.waiting),
    }


@dataclass
class _Load:
    """A scheduler that is kept full."""

    config: Config
    policy: str
    now: float = 0.0
    added: int = 0
    left: dict[int, int] = field(default_factory=dict)  # tokens that each request is still to draw

    def __post_init__(self) -> None:
        import numpy as np

        from jaxllm.serving.kv_cache import PagePool
        from jaxllm.serving.scheduler import Scheduler, SchedulerConfig

        n, size = self.config.running, 16
        limits = SchedulerConfig(n, max(2048, 2 * n), 4096, size, policy=self.policy)
        self.scheduler = Scheduler(limits, PagePool(n * 1024 // size + 1))
        rng = np.random.default_rng(0)
        self.prompts, self.outputs = rng.integers(64, 192, 100_000).tolist(), rng.integers(20, 381, 100_000).tolist()
        self.in_flight: deque = deque()
        for _ in range(n + self.config.waiting):
            self.add()

    def add(self) -> None:
        i, self.added = self.added, self.added + 1
        prompt, output = self.prompts[i % 100_000], self.outputs[i % 100_000]
        self.left[i] = output
        # max_tokens is what users leave it at; srpt alone goes by it.
        most = output if self.policy == "srpt" else 2000
        self.scheduler.add(i, prompt, most, tenant=f"tenant {i % self.config.tenants}", now=self.now)

    def step(self) -> float:
        """Plans a step and reads the one before; returns the seconds of processor time that it took."""
        self.now += _STEP_S
        start = time.process_time()
        self.in_flight.append(self.scheduler.schedule(self.now))
        took = time.process_time() - start
        if len(self.in_flight) < 2:
            return took
        plan = self.in_flight.popleft()
        ended = []
        for s in plan.scheduled:
            if s.samples and not s.sequence.ended:
                self.left[s.sequence.id] -= 1
                if self.left[s.sequence.id] == 0:
                    ended.append(s.sequence.id)
        start = time.process_time()
        self.scheduler.complete(plan)
        for id in ended:
            self.scheduler.finish(id)
            self.add()
        return took + time.process_time() - start
