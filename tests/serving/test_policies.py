"""Policies: each over lives as crowded as can be, against the device of lists; then what each one is for."""

import json
import random

import pytest
from golden_cases import LENGTH, MODELS, generated, golden
from hypothesis import settings
from test_scheduler import FakeEngine, SchedulerMachine, limits, random_life, replay

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError, RequestError
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.policies import POLICIES, make_policy
from jaxllm.serving.policies.outputs import Lengths
from jaxllm.serving.replay import replay as replay_record
from jaxllm.serving.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Times as short as steps, so that ranks change all the while.
OPTIONS = {
    "mlfq": dict(first_quantum_s=0.04, starvation_s=0.3, levels=4),
    "hrrn": dict(review_s=0.05),
    "sjf": dict(review_s=0.05),
    "srpt": dict(review_s=0.05, gain=1.0),
    "vtc": dict(review_s=0.05, weights={"1": 2.0}),
    "adaptive": dict(review_s=0.05, margin=0.0, most_s=1.0),
}


class PolicyMachine(SchedulerMachine):
    """The scheduler's own machine, under the other policies."""

    policies = {name: OPTIONS.get(name, {}) for name in POLICIES if name not in ("fcfs", "priority")}


PolicyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestPolicies = PolicyMachine.TestCase


@pytest.mark.parametrize("policy", PolicyMachine.policies)
def test_random_lives(policy):
    """No request is lost or run twice, no page either, every plan is derived again, and all end."""
    preemptions = 0
    for seed in range(40):
        engine = random_life(seed, policy, **OPTIONS.get(policy, {}))
        preemptions += engine.scheduler.num_preemptions
        if seed % 10 == 0:
            assert replay(engine).plans == engine.plans
    assert preemptions > 10


@pytest.mark.parametrize("policy", POLICIES)
def test_work_conserving(policy):
    """While there are those who could run, all slots are taken, and all who are not done are served."""

    class Busy(FakeEngine):
        def check(self, plan):
            super().check(plan)
            ready = [s for s in self.scheduler.waiting[:1] if not s.in_flight]
            assert len(self.scheduler.running) == 4 or not ready
            assert len(plan.scheduled) + sum(s.num_tokens >= s.num_prompt + s.max_tokens for s in self.scheduler.running) >= 4 or not ready

    rng, engine = random.Random(0), Busy(limits(policy=policy, policy_options=OPTIONS.get(policy, {}), max_num_batched_tokens=64), 100)
    for k in range(60):
        if k < 40:
            engine.add(str(k), [100 * k + i for i in range(rng.randint(1, 12))], 16, rng.randint(1, 16), tenant=str(k % 2))
        engine.step()
    engine.drain()


def firsts(engine: FakeEngine, steps: int = 400) -> list[str]:
    """Requests in the order in which they end."""
    for _ in range(steps):
        if not engine.requests:
            break
        engine.step()
    return list(engine.outputs)


def test_priority_takes_places_when_asked_to():
    for policy, order in (("priority", ["low", "high"]), ("priority_preempt", ["high", "low"])):
        engine = FakeEngine(limits(max_num_seqs=1, policy=policy), 100)
        engine.add("low", [1] * 4, 14, 14, priority=1)
        for _ in range(4):
            engine.step()
        engine.add("high", [2] * 4, 14, 14, priority=0)
        assert firsts(engine) == order
        assert engine.scheduler.num_preemptions == (policy == "priority_preempt")


def test_mlfq_by_hand():
    """A long request gives way to a new one when its first quantum is spent, and comes back when it has waited long enough."""
    options = dict(first_quantum_s=0.2, growth=2.0, step_s=0.01, prompt_token_s=0.01, starvation_s=1.0)
    engine = FakeEngine(limits(max_num_seqs=1, max_num_batched_tokens=32, policy="mlfq", policy_options=options), 100)
    scheduler = engine.scheduler
    engine.add("long", [1] * 4, 25, 25)
    engine.add("skips", [2] * 25, 5, 5)  # 0.25 s for its first token: it joins the second queue
    levels = {s.id: s.level for s in scheduler.waiting}
    assert levels == {"long": 0, "skips": 1}
    for _ in range(5):
        engine.step(seconds=0.05)
    running = scheduler.running[0]
    assert running.id == "long" and running.level == 1 and running.service == pytest.approx(0.2)
    engine.add("new", [3] * 4, 25, 25)  # in the first queue: it takes the place of the one that was demoted
    engine.step(seconds=0.05)
    assert [s.id for s in scheduler.running] == ["new"] and scheduler.num_preemptions == 1
    waited = {s.id: s for s in scheduler.waiting}
    for _ in range(40):
        engine.step(seconds=0.05)
        if waited["long"].slot >= 0:
            break
    assert engine.now - 0.3 <= 1.0 + 0.2 + 0.1, "nobody starves: after a second it is in the first queue, before a quantum has passed"
    engine.drain()
    assert [make_policy("mlfq", options).quantum(level) for level in range(3)] == [0.2, 0.4, 0.8]


def test_hrrn_and_sjf_prefer_the_short_but_nobody_waits_for_ever():
    for policy in ("hrrn", "sjf"):
        engine = FakeEngine(limits(max_num_seqs=1, max_num_batched_tokens=32, policy=policy, policy_options={"prompt_weight": 10.0}), 100)
        engine.add("first", [1] * 4, 8, 8)
        engine.step()
        engine.add("long", [2] * 24, 4, 4)
        engine.add("short", [3] * 2, 4, 4)
        for k in range(2000):
            if "long" in engine.outputs:
                break
            if len(engine.requests) < 6:
                engine.add(f"more {k}", [4] * 2, 4, 4)
            engine.step(seconds=0.5)
        order = list(engine.outputs)
        assert order.index("short") < order.index("long") < 450 and len(order) > 4


def test_vtc_shares_between_tenants():
    """One tenant floods; the other, of which there is always one request, gets half the tokens, or what its weight says."""
    for weights, share in (({}, 0.5), ({"big": 3.0}, 0.25)):
        engine = FakeEngine(limits(max_num_seqs=2, policy="vtc", policy_options={"weights": weights, "review_s": 0.01}), 100)
        for k in range(60):
            engine.add(f"big {k}", [k] * 4, 8, 8, tenant="big")
        for k in range(150):
            while sum(name.startswith("small") for name in engine.requests) < 2:
                engine.add(f"small {len(engine.log)}", [k] * 4, 8, 8, tenant="small")
            engine.step()
        served = {name: t.service for name, t in engine.scheduler.book.tenants.items()}
        assert served["small"] / sum(served.values()) == pytest.approx(share, abs=0.06)


def test_adaptive_bounds_how_long_one_is_overtaken():
    """However many short ones come, a request that came `most_s` before them goes first."""
    options = dict(most_s=5.0, seniority=0.0, margin=0.0, review_s=0.05)
    engine = FakeEngine(limits(max_num_seqs=1, max_num_batched_tokens=32, policy="adaptive", policy_options=options), 100)
    engine.add("long", [1] * 4, 25, 25)
    for k in range(400):
        if len(engine.requests) < 4:
            engine.add(f"short {k}", [k] * 2, 2, 2)
        engine.step(seconds=0.1)
        if "long" in engine.outputs:
            break
    assert engine.scheduler.num_preemptions > 0, "short ones have overtaken it"
    assert engine.now < 5.0 + (25 + 4 + 20) * 0.1 * 2


def test_lengths_are_learned():
    """By the prompt, if it tells; from all, if it does not."""
    lengths, rng = Lengths(), random.Random(0)
    for _ in range(2000):
        lengths.add(10, rng.randint(5, 15))
        lengths.add(1000, rng.randint(300, 500))
    assert lengths.expected(10) == pytest.approx(10, rel=0.1) and lengths.expected(1000) == pytest.approx(400, rel=0.05)
    assert lengths.expected(100) == lengths.mean == pytest.approx(205, rel=0.05), "nobody like it has ended"
    assert lengths.spread == pytest.approx(42, rel=0.1), "of lengths from 300 to 500, 58; from 5 to 15, 3"
    # Who has drawn 280 (its bin begins at 256) is done within 244 more, 144 on average; of those of 10, each ends within 10.
    assert lengths.index(1000, 280, 0.0) == pytest.approx(144, rel=0.1) and lengths.index(10, 1, 0.0) < 15
    alike = Lengths()
    for i in range(4000):
        alike.add(10 if i % 2 else 1000, rng.choice([10, 400]))
    assert alike.expected(10) == pytest.approx(alike.mean, rel=0.02) and alike.spread == pytest.approx(195, rel=0.05)
    # Half end within 10 tokens: 0.5 endings for 10 tokens; who has drawn 20 has 380 to go.
    assert alike.index(10, 1, 0.0) == pytest.approx(20, rel=0.3) and alike.index(1000, 20, 0.0) == pytest.approx(380, rel=0.15)
    assert alike.index(10, 20, 1.0) > alike.index(10, 20, 0.0), "long ones count for less"


def test_refusals():
    for name, options, message in (
        ("lifo", {}, "unknown scheduling policy `lifo`"),
        ("mlfq", {"quantum": 1}, "quantum"),
        ("mlfq", {"growth": 0}, "growth must be above 0"),
        ("vtc", {"weights": {"a": 0.0}}, "weight of tenant 'a'"),
        ("adaptive", {"most_s": -1.0}, "most_s must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_policy(name, options)
    scheduler = Scheduler(limits(policy="mlfq"), PagePool(20))
    with pytest.raises(RequestError, match="priority=1 .* scheduling_policy='mlfq'"):
        scheduler.add("a", 1, 1, priority=1)
    assert json.dumps(vars(scheduler.config))  # as records hold it


@pytest.mark.parametrize("policy", ["mlfq", "adaptive", "vtc", "priority_preempt"])
def test_an_engine_gives_the_same_tokens(policy, tmp_path):
    """In a pool for little more than one request, whoever gives way to whom; and the record's plans are derived again."""
    options = {"mlfq": dict(first_quantum_s=0.05, starvation_s=5.0), "adaptive": dict(review_s=1e-3, margin=0.0, most_s=1.0)}
    llm = LLM(
        MODELS / "llama_gqa",
        dtype="float32",
        max_num_seqs=3,
        max_num_batched_tokens=16,
        page_size=4,
        max_model_len=LENGTH,
        num_pages=LENGTH // 4 + 6,
        skip_tokenizer_init=True,
        warmup=False,
        scheduling_policy=policy,
        scheduling_policy_options=options.get(policy, {}),
        record=str(tmp_path / "record.jsonl"),
    )
    prompts = [{"prompt_token_ids": g["prompt"].tolist(), "tenant": str(i)} for i, g in enumerate(golden("llama_gqa"))] * 3
    priorities = [3 - i % 3 if policy == "priority_preempt" else 0 for i in range(len(prompts))]
    params = [SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, priority=p) for p in priorities]
    outputs = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == generated("llama_gqa") * 3
    assert llm.engine.scheduler.num_preemptions > 0 and llm.engine.pool.num_free == llm.engine.pool.capacity
    llm.engine.close()
    assert replay_record(str(tmp_path / "record.jsonl")).plans > 50
    with pytest.raises(RequestError, match="tenant must be a string"):
        llm.generate({"prompt_token_ids": [1], "tenant": 3})
