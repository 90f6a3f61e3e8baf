"""What each policy promises to those who wait, over drawn arrivals: who may be let in before whom, that no place is left empty while
somebody could take it, and that all end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import FakeEngine, limits

from jaxllm.serving.policies import POLICIES
from jaxllm.serving.scheduler import Sequence, StepPlan

STEP_S = 0.05
# Short enough that bounds are reached in a life of some dozens of steps.
OPTIONS = {
    "mlfq": dict(first_quantum_s=0.1, step_s=0.01, prompt_token_s=0.001, starvation_s=0.6, levels=4),
    "hrrn": dict(review_s=0.01),
    "sjf": dict(review_s=0.01, ageing=20.0),
    "srpt": dict(review_s=0.01, gain=1.0, ageing=20.0),
    "vtc": dict(review_s=0.01),
    "adaptive": dict(review_s=0.01, margin=0.0, most_s=0.5, seniority=1.0, reach=0.05),
}


class Watched(FakeEngine):
    """Looks at whom each plan lets in, and whom it leaves waiting."""

    overtaken = 0  # times that one was let in before one that had come earlier

    def check(self, plan: StepPlan) -> None:
        super().check(plan)
        waiting = [s for s in self.scheduler.waiting if not s.in_flight and s not in self.gave_way]
        # The first of those who wait holds all up while a token of its is in flight, for a step.
        first = [s for s in self.scheduler.waiting[:1] if not s.in_flight and s not in self.gave_way]
        full = len(self.scheduler.running) == self.limits.max_num_seqs or plan.num_tokens == self.limits.max_num_batched_tokens
        assert full or not first, "a place is empty"
        for s in plan.scheduled:
            for x in waiting if s.admitted else ():
                self.overtaken += s.sequence.arrival > x.arrival
                assert self.may_overtake(s.sequence, x), f"{s.sequence.id} was let in before {x.id}"

    def step(self, *args, **options) -> None:
        before = set(self.scheduler.running)
        self.gave_way = before  # who gives way in a plan may be whom it makes room for; who ends is not waiting
        super().step(*args, **options)

    def may_overtake(self, y: Sequence, x: Sequence) -> bool:
        policy, name = self.scheduler.policy, self.limits.policy
        earlier = y.arrival < x.arrival
        later_s = y.arrived - x.arrived
        if name == "fcfs":
            return earlier
        if name in ("priority", "priority_preempt"):
            return (y.priority, y.arrival) < (x.priority, x.arrival)
        if name == "mlfq":  # who has waited for so long is in the first queue
            return y.level == 0 or x.turn > self.now - policy.starvation_s
        if name == "hrrn":
            return (self.now - y.arrived) / y.spent >= (self.now - x.arrived) / x.spent - 1e-9
        if name in ("sjf", "srpt"):  # its work is at most that of its prompt and of its max_tokens
            return later_s <= (policy.prompt_weight * x.num_tokens + x.max_tokens) / policy.ageing + 1e-9
        if name == "vtc":
            return y.tenant is not x.tenant or earlier or bool(y.preemptions or x.preemptions)
        assert name == "adaptive"
        return later_s <= policy.most_s + policy.seniority * y.service + 1e-9


ARRIVALS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 16), st.integers(0, 2)), min_size=4, max_size=24)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_overtaken_beyond_the_policys_bound(policy):
    overtaken = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(ARRIVALS, st.integers(1, 3))
    def lives(arrivals, places):
        config = limits(max_num_seqs=places, max_num_batched_tokens=40, policy=policy, policy_options=OPTIONS.get(policy, {}))
        engine = Watched(config, 40)
        for k, (pause, prompt, outputs, kind) in enumerate(arrivals):
            for _ in range(pause):
                engine.step(seconds=STEP_S)
            priority = kind if policy.startswith("priority") else 0
            tenant = str(kind) if policy == "vtc" else ""
            most = outputs if policy == "srpt" else 16
            engine.add(str(k), [100 * k + i for i in range(prompt)], most, outputs, priority, tenant)
        engine.drain()
        assert len(engine.outputs) == len(arrivals) and all(len(engine.outputs[str(k)]) == a[2] for k, a in enumerate(arrivals))
        overtaken.append(engine.overtaken)

    lives()
    assert (sum(overtaken) > 20) == (policy != "fcfs"), "else nothing was at stake"
