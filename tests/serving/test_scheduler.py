"""The scheduler against a device made of Python lists: what it plans, when it is run, gives each request the tokens it has alone.

The device's "model" draws a token that depends on every token before it, read back through the pages that the plan names: a
page shared by mistake, a token computed twice, late or never, a slot given to two, all give a wrong token.
"""

import random
from collections import Counter, deque
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxllm.errors import RequestError
from jaxllm.serving.host_tier import TieredPool
from jaxllm.serving.kv_cache import PagePool, page_names
from jaxllm.serving.runner import _token_ids
from jaxllm.serving.scheduler import Scheduler, SchedulerConfig, StepPlan


def prompt_of(length: int, alike: int, number: int) -> list[int]:
    """A prompt whose first `alike` tokens are every prompt's, and the others nobody else's."""
    return [i if i < alike else 10_000 * (number + 2) + i for i in range(length)]


def next_token(tokens: list[int], seed: int) -> int:
    return hash((seed, *tokens)) % 10_000


class FakeEngine:
    """What `Engine` does with a scheduler, on the device described above."""

    def __init__(self, limits: SchedulerConfig, num_pages: int, shares_pages: bool = False, host_pages: int = 0):
        pool = TieredPool(num_pages, host_pages) if host_pages else PagePool(num_pages)
        self.limits, self.pool, self.shares_pages, self.host_pages = limits, pool, shares_pages, host_pages
        self.host = {}  # cells of the pages in host memory, by their slots
        self.scheduler = Scheduler(limits, self.pool)
        self.cells = {}  # (page, place in it) -> (token, position, whether its rotary angles are those of a long sequence)
        self.last_tokens = [None] * limits.max_num_seqs
        self.requests, self.in_flight, self.plans = {}, deque(), []
        self.computed, self.sampled = {}, {}  # of each sequence: (preemptions, outgrown, tokens computed since), tokens drawn
        self.slots = {}  # of each running sequence, as its plans told
        self.outputs = {}  # of requests that have ended by themselves
        self.log = []  # of calls, to make them again
        self.now = 0.0

    def add(self, id: str, prompt: list[int], max_tokens: int, stop_at: int, priority: int = 0, tenant: str = "") -> None:
        """A request that happens to end after `stop_at` tokens."""
        self.log.append(("add", id, prompt, max_tokens, stop_at, priority, tenant))
        self._add(id, prompt, [], max_tokens, stop_at, priority, tenant=tenant)

    def fork(self, id: str, source: str, num_outputs: int, drawn: list[int], max_tokens: int, stop_at: int) -> None:
        """A request with the prompt of another, and the first of its outputs, and perhaps more that differ (a beam has one)."""
        self.log.append(("fork", id, source, num_outputs, drawn, max_tokens, stop_at))
        of = self.requests[source]
        outputs = of.output_token_ids[:num_outputs] + drawn
        common = len(of.prompt_token_ids) + num_outputs
        self._add(id, of.prompt_token_ids, outputs, max_tokens, stop_at, of.priority, fork_of=source, common=common)

    def _add(self, id, prompt, outputs, max_tokens, stop_at, priority, **fork) -> None:
        names = page_names(prompt + outputs, self.limits.page_size) if self.shares_pages else []
        options = dict(num_outputs=len(outputs), priority=priority, now=self.now, **fork)
        self.scheduler.add(id, len(prompt), max_tokens, names, **options)
        self.requests[id] = SimpleNamespace(
            request=SimpleNamespace(prompt_token_ids=prompt),
            prompt_token_ids=prompt,
            output_token_ids=list(outputs),
            num_given=len(outputs),
            max_tokens=max_tokens,
            stop_at=stop_at,
            priority=priority,
            seed=len(self.log),
            retired=False,
        )

    def abort(self, id: str) -> None:
        self.log.append(("abort", id))
        del self.requests[id]
        self.scheduler.finish(id)

    def retire(self, id: str) -> None:
        self.log.append(("retire", id))
        self.requests[id].retired = True
        self.scheduler.retire(id)

    def forget(self) -> None:
        self.log.append(("forget",))
        self.scheduler.reset_prefix_cache()

    def step(self, wait: bool = False, seconds: float = 0.05) -> None:
        """One step, that long after the one before; `wait` reads it at once instead of one step later."""
        self.log.append(("step", wait, seconds))
        self.now += seconds
        plan = self.scheduler.schedule(self.now)
        self.check(plan)
        if plan.scheduled:
            self.move(self.cells, self.host, plan.saves)
            self.move(self.host, self.cells, plan.fetches)
            self.move(self.cells, self.cells, plan.copies)
            for s in plan.scheduled:  # all writes come before all reads, as in the attention op
                self.write(s)
            self.in_flight.append((plan, [self.draw(s) for s in plan.scheduled]))
        else:
            assert not (plan.copies or plan.saves or plan.fetches)
            assert self.in_flight or all(r.retired for r in self.requests.values()), "stalled"
        while self.in_flight and (len(self.in_flight) > 1 or not plan.scheduled or wait):
            self.read(*self.in_flight.popleft())

    def move(self, source: dict, target: dict, pairs) -> None:
        for src, dst in pairs:
            for place in range(self.limits.page_size):
                target[dst, place] = source.get((src, place))

    def is_long(self, s) -> bool:
        return self.limits.recompute_beyond is not None and s.num_tokens > self.limits.recompute_beyond

    def write(self, s) -> None:
        """Puts the scheduled tokens of a sequence into its pages."""
        request, size = self.requests[s.sequence.id], self.limits.page_size
        ids = _token_ids(request, s)
        assert len(ids) == s.count and -1 not in ids[:-1]
        unread = s.num_tokens - len(request.prompt_token_ids) - len(request.output_token_ids)
        assert (ids[-1] == -1) == (unread > 0 and s.samples)
        for position, token in enumerate(ids, s.start):
            token = self.last_tokens[s.sequence.slot] if token < 0 else token
            page = s.pages[position // size]
            self.cells[page, position % size] = (token, position, self.is_long(s))

    def draw(self, s) -> int | None:
        """The next token of a sequence, if all that there are have been computed."""
        if not s.samples:
            return None
        size = self.limits.page_size
        seen = [self.cells[s.pages[p // size], p % size] for p in range(s.start + s.count)]
        assert [(position, is_long) for _, position, is_long in seen] == [(p, self.is_long(s)) for p in range(len(seen))]
        request, tokens = self.requests[s.sequence.id], [token for token, _, _ in seen]
        known = request.prompt_token_ids + request.output_token_ids
        assert tokens[: len(known)] == known, "it reads its own tokens"
        drawn = next_token(tokens, request.seed)
        self.last_tokens[s.sequence.slot] = drawn
        return drawn

    def read(self, plan: StepPlan, drawn: list[int | None]) -> None:
        self.scheduler.complete(plan)
        for s, token in zip(plan.scheduled, drawn, strict=True):
            if not s.samples or s.sequence.ended or s.sequence.retired:
                continue
            request = self.requests[s.sequence.id]
            request.output_token_ids.append(token)
            if len(request.output_token_ids) == request.stop_at:
                self.outputs[s.sequence.id] = request.output_token_ids
                tokens = request.prompt_token_ids + request.output_token_ids[: request.num_given]
                for token in request.output_token_ids[request.num_given :]:
                    assert token == next_token(tokens, request.seed)
                    tokens.append(token)
                del self.requests[s.sequence.id]
                self.scheduler.finish(s.sequence.id)
            elif self.shares_pages:
                names = page_names(request.prompt_token_ids + request.output_token_ids, self.limits.page_size)
                self.scheduler.name_pages(s.sequence.id, names[len(s.sequence.page_names) :])

    def check(self, plan: StepPlan) -> None:
        """All that must be true of a plan when it is made."""
        scheduled, limit, size = plan.scheduled, self.limits.recompute_beyond, self.limits.page_size
        self.plans.append(
            [(s.sequence.id, s.sequence.slot, s.start, s.count, s.samples, s.num_tokens, s.pages, s.admitted) for s in scheduled]
        )
        counts = [s.count for s in scheduled]
        assert plan.num_tokens == sum(counts) <= self.limits.max_num_batched_tokens
        assert len(scheduled) <= self.limits.max_num_seqs and len({id(s.sequence) for s in scheduled}) == len(scheduled)
        assert all(n == 1 for n in counts[: plan.num_decode]) and all(n > 1 for n in counts[plan.num_decode :])
        copied = dict((dst, src) for src, dst in plan.copies)
        assert len(copied) == len(plan.copies) <= self.limits.max_num_seqs and 0 not in [*copied, *copied.values()]
        written = Counter()
        for s in scheduled:
            sequence = s.sequence
            assert sequence.id in self.requests and sequence in self.scheduler.running
            assert s.pages == tuple(sequence.pages) and len(s.pages) * size >= s.start + s.count
            outgrown = limit is not None and s.num_tokens > limit
            life = (sequence.preemptions, outgrown)
            done = self.computed.get(sequence, {}).get(life)
            assert s.admitted == (self.slots.get(sequence, (None, None))[0] != sequence.preemptions)
            assert s.admitted or self.slots[sequence][1] == sequence.slot
            self.slots[sequence] = (sequence.preemptions, sequence.slot)
            if done is not None:
                assert s.start == done, "each token is computed once, in order, unless all was thrown away"
            elif s.start % size:
                assert copied.pop(s.pages[s.start // size]), "it begins in a page of its own, copied from its source's"
            writes = s.pages[s.start // size : -(-(s.start + s.count) // size)]
            written.update(writes)
            assert all(self.pool._users[page] == 1 for page in writes) or self.shares_pages, "a page that is written has one user"
            self.computed[sequence] = {life: s.start + s.count}
            assert s.samples == (s.start + s.count == s.num_tokens)
            self.sampled[sequence] = self.sampled.get(sequence, 0) + s.samples
            assert self.sampled[sequence] <= sequence.max_tokens
        assert set(written.values()) <= {1}, "a page is written by one sequence"
        assert not copied, "a copy is for a sequence that begins in it"
        self.check_pool()

    def check_pool(self) -> None:
        running, waiting, kept = self.scheduler.running, list(self.scheduler.waiting), list(self.scheduler._kept)
        known = list(self.scheduler._by_id.values())
        parked = [fork for s in [*known, *kept] for fork in s.parked]
        assert {s.id for s in known} == set(self.requests)
        places = Counter(id(s) for s in [*running, *waiting, *parked])
        assert places == Counter(id(s) for s in known if not s.retired), "each is in one place"
        if self.host_pages:
            slots = list(self.pool.host.values())
            assert len(set(slots)) == len(slots) <= self.host_pages and set(slots) <= set(range(self.host_pages))
        assert not any(s.pages or s.to_fetch for s in waiting + parked) and all(s.slot == -1 for s in waiting + parked + kept)
        for s in {*known, *kept}:
            forks = [fork for fork in known if fork.source is s]
            assert len(forks) == s.num_forks and all(fork in waiting or fork in s.parked or fork.retired for fork in forks)
        assert all(s.retired and (not s.ended or s.num_forks) for s in kept)
        users = Counter(page for s in [*running, *kept] for page in s.pages)
        assert all(len(set(s.pages)) == len(s.pages) for s in running)
        assert dict(users) == {page: n for page, n in enumerate(self.pool._users) if n}
        free = [*self.pool._free, *self.pool._cached]
        assert len(free) == self.pool.num_free >= self.scheduler._promised == sum(s.promised for s in running)
        assert not any(s.promised for s in [*waiting, *kept, *parked])
        assert sorted([*users, *free]) == list(range(1, self.pool.num_pages)), "each page is held or free, page 0 never either"
        for queue in (running, waiting):
            ranks = [s.rank for s in queue]
            assert ranks == sorted(ranks), "none overtakes another"
        if self.limits.policy == "fcfs" and running and waiting and not any(entry[0] == "fork" for entry in self.log):
            assert running[-1].rank < waiting[0].rank
        slots = [s.slot for s in running]
        assert sorted([*slots, *self.scheduler._free_slots]) == list(range(self.limits.max_num_seqs))

    def drain(self) -> None:
        """Runs until all has ended: the oldest request advances at least every second step."""
        for id in [id for id, r in self.requests.items() if r.retired]:
            self.abort(id)
        bound = sum(2 * (len(r.prompt_token_ids) + 2 * r.max_tokens) + 4 for r in self.requests.values()) + 4
        if self.scheduler.policy.preempts:
            bound *= 4  # who gives way is computed anew; but it has drawn a token in its turn
        for _ in range(bound):
            if not self.requests and not self.in_flight:
                break
            self.step()
        assert not self.requests and not self.in_flight, f"not done after {bound} steps"
        assert not self.scheduler.has_work and not self.scheduler._kept and self.pool.num_free == self.pool.capacity


def replay(engine: FakeEngine) -> FakeEngine:
    """A new engine that was told the same things."""
    twin = FakeEngine(engine.limits, engine.pool.num_pages, engine.shares_pages, engine.host_pages)
    for name, *arguments in list(engine.log):
        getattr(twin, name)(*arguments)
    return twin


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, end and are aborted at any moment, with a step in flight or none."""

    policies: dict[str, dict] = {"fcfs": {}, "priority": {}}  # and their constants

    @initialize(data=st.data())
    def start(self, data):
        draw = lambda *range: data.draw(st.integers(*range))
        policy = data.draw(st.sampled_from(list(self.policies)))
        page_size, max_model_len, max_num_seqs = draw(1, 5), draw(4, 30), draw(1, 5)
        self.limits = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=draw(max_num_seqs, 20),
            max_model_len=max_model_len,
            page_size=page_size,
            recompute_beyond=data.draw(st.none() | st.integers(1, 20)),
            policy=policy,
            policy_options=self.policies[policy],
        )
        one = -(-max_model_len // page_size)  # the pool holds the longest request, and little more
        shares_pages = self.limits.recompute_beyond is None and data.draw(st.booleans())
        host_pages = draw(0, 3 * one) if shares_pages else 0
        self.engine = FakeEngine(self.limits, 1 + one + draw(0, 2 * one), shares_pages, host_pages)

    def free_name(self) -> str | None:
        return next((i for i in "abcdefghijklmnop" if i not in self.engine.requests), None)  # names are used again

    @rule(data=st.data())
    def add(self, data):
        num_prompt = data.draw(st.integers(1, self.limits.max_model_len - 1))
        max_tokens = data.draw(st.integers(1, self.limits.max_model_len - num_prompt))
        stop_at = data.draw(st.integers(1, max_tokens))
        priority = data.draw(st.integers(-1, 1)) if self.limits.policy.startswith("priority") else 0
        if name := self.free_name():
            alike = data.draw(st.integers(0, num_prompt))
            tenant = str(len(self.engine.log) % 3)
            self.engine.add(name, prompt_of(num_prompt, alike, len(self.engine.log)), max_tokens, stop_at, priority, tenant)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), times=st.integers(1, 3))
    def fork(self, data, times):
        """Some forks of one request, which may not have begun, run, wait again or be retired."""
        source = data.draw(st.sampled_from(sorted(self.engine.requests)))
        of = self.engine.requests[source]
        for _ in range(times):
            num_outputs = data.draw(st.integers(0, len(of.output_token_ids)))
            room = self.limits.max_model_len - len(of.prompt_token_ids) - num_outputs
            drawn = data.draw(st.lists(st.integers(10_001, 10_099), max_size=max(0, min(3, room - 1))))
            if room - len(drawn) < 1 or (name := self.free_name()) is None:
                return
            given = num_outputs + len(drawn)
            max_tokens = given + data.draw(st.integers(1, room - len(drawn)))
            self.engine.fork(name, source, num_outputs, drawn, max_tokens, data.draw(st.integers(given + 1, max_tokens)))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def retire(self, data):
        name = data.draw(st.sampled_from(sorted(self.engine.requests)))
        if not self.engine.requests[name].retired:
            self.engine.retire(name)

    @rule(wait=st.booleans(), times=st.integers(1, 6))
    def step(self, wait, times):
        for _ in range(times):
            self.engine.step(wait)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @rule()
    def forget(self):
        self.engine.forget()

    @invariant()
    def pool_is_whole(self):
        if hasattr(self, "engine"):
            self.engine.check_pool()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()
            assert replay(self.engine).plans == self.engine.plans


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
TestScheduler = SchedulerMachine.TestCase


def random_life(seed: int, policy: str | None = None, **options) -> FakeEngine:
    """As the machine above, but always crowded, which drawn examples seldom are."""
    rng = random.Random(seed)
    page_size, longest, max_num_seqs = rng.randint(1, 5), rng.randint(4, 30), rng.randint(1, 5)
    one = -(-longest // page_size)
    beyond = rng.choice([None, None, rng.randint(1, 20), rng.randint(1, 20)])
    chosen = rng.choice(["fcfs", "priority"])
    policy = policy or chosen
    limits = SchedulerConfig(max_num_seqs, rng.randint(max_num_seqs, 20), longest, page_size, beyond, policy, options)
    engine = FakeEngine(limits, 1 + one + rng.randint(0, one), shares_pages=beyond is None and rng.random() < 0.7)
    forks = rng.choice([0, 0.2, 0.5])
    for k in range(rng.randint(1, 60)):
        choice = rng.random()
        names = sorted(engine.requests)
        if choice < 0.3 and len(names) < 8:
            if names and rng.random() < forks:
                source = rng.choice(names)
                of = engine.requests[source]
                num_outputs = rng.randint(0, len(of.output_token_ids))
                room = longest - len(of.prompt_token_ids) - num_outputs
                drawn = [10_000 + k] * rng.randint(0, max(0, min(3, room - 1)))
                if room - len(drawn) > 0:
                    max_tokens = rng.randint(num_outputs + len(drawn) + 1, num_outputs + room)
                    engine.fork(str(k), source, num_outputs, drawn, max_tokens, max_tokens)
                    if rng.random() < 0.3 and not of.retired:
                        engine.retire(source)
                continue
            num_prompt = rng.randint(1, longest - 1)
            max_tokens = rng.randint(1, longest - num_prompt)
            prompt = prompt_of(num_prompt, rng.randint(0, num_prompt), k)
            priority = rng.randint(-1, 1) if policy.startswith("priority") else 0
            engine.add(str(k), prompt, max_tokens, rng.choice([max_tokens, rng.randint(1, max_tokens)]), priority, str(k % 3))
        elif choice < 0.35 and names:
            engine.abort(rng.choice(names))
        elif choice < 0.37:
            engine.forget()
        else:
            engine.step(wait=rng.random() < 0.2)
    engine.drain()
    return engine


@pytest.mark.parametrize("first_seed", range(0, 600, 100))
def test_random_lives(first_seed):
    for seed in range(first_seed, first_seed + 100):
        random_life(seed)


LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32, page_size=4)


def limits(**changes) -> SchedulerConfig:
    return SchedulerConfig(**{**vars(LIMITS), **changes})


@pytest.mark.parametrize("recompute_beyond", [None, 12, 20])
def test_crowded_pool(recompute_beyond):
    """What the machine above draws really meets preemption, chunks, waiting and growth past the limit."""
    engine = FakeEngine(limits(recompute_beyond=recompute_beyond), 12)
    for i in range(8):
        engine.add(str(i), [1000 * i + j for j in range(5 + i)], 18, 18 - i)
    engine.drain()
    assert engine.scheduler.num_preemptions > 0 and set(engine.outputs) == set("01234567")
    assert any(count > 1 and not samples for plan in engine.plans for _, _, _, count, samples, *_ in plan)
    restarts = sum(start == 0 for plan in engine.plans for _, _, start, *_ in plan)
    if recompute_beyond is None:
        assert restarts <= 8 + engine.scheduler.num_preemptions
    else:
        assert restarts > 8


def test_requests_that_begin_alike_share_pages():
    engine = FakeEngine(limits(max_num_batched_tokens=32), 64, shares_pages=True)
    for i in range(4):
        engine.add(str(i), prompt_of(20, 18, i), 6, 6)
    engine.step()
    # The first computes all, the others share its four full pages in the same step.
    assert [(start, count) for _, _, start, count, *_ in engine.plans[0]] == [(0, 20), (16, 4), (16, 4), (16, 4)]
    assert len({page for *_, pages, _ in engine.plans[0] for page in pages}) == 4 + 4
    engine.drain()


def test_completions_share_their_prompt():
    """Three forks wait for the prompt, then share its full pages and copy the last; each computes its last token alone."""
    engine = FakeEngine(limits(max_num_batched_tokens=6), 64)
    engine.add("a", list(range(10)), 6, 6)
    for name in "bcd":
        engine.fork(name, "a", 0, [], 6, 6)
    engine.add("e", list(range(100, 103)), 6, 6)
    engine.step()
    engine.step()
    engine.step()
    assert [[(id, start, count) for id, _, start, count, *_ in plan] for plan in engine.plans] == [
        [("a", 0, 6)],
        [("a", 6, 4), ("e", 0, 2)],  # those behind do not wait with them
        [("a", 10, 1), ("e", 2, 1), ("b", 9, 1), ("c", 9, 1)],
    ]
    first, second, third = (pages for id, *_, pages, _ in engine.plans[2] if id in "abc")
    assert first[:2] == second[:2] == third[:2] and len({first[2], second[2], third[2]}) == 3
    engine.drain()
    assert [start for plan in engine.plans for id, _, start, *_ in plan if id == "d"][0] == 9  # its source had ended long ago


def test_a_source_that_has_ended_keeps_its_pages_for_forks_unless_others_need_them():
    for others in ([], [90] * 30):
        engine = FakeEngine(limits(max_num_seqs=2, max_num_batched_tokens=32), 10)
        engine.add("a", list(range(17)), 4, 4)
        for _ in range(3):
            engine.step()
        engine.retire("a")
        if others:
            engine.add("other", others, 1, 1)
            engine.step()
        engine.fork("b", "a", 1, [77], 3, 3)
        engine.fork("c", "a", 1, [78], 3, 3)
        engine.abort("a")
        engine.drain()
        starts = {id: start for plan in reversed(engine.plans) for id, _, start, *_ in plan}
        assert (starts["b"], starts["c"]) == ((0, 0) if others else (18, 18))


def test_priority():
    """The lowest number runs first, ties by arrival; who runs is thrown out for pages only, the last rank first."""
    engine = FakeEngine(limits(max_num_seqs=2, policy="priority"), 10)
    for name, priority in (("a", 0), ("b", 1), ("c", 1), ("d", -1), ("e", 0)):
        engine.add(name, [ord(name)] * 4, 14, 14, priority)
    engine.step()
    assert [id for id, *_ in engine.plans[0]] == ["d", "a"]
    engine.drain()
    assert list(engine.outputs) == ["d", "a", "e", "b", "c"] and engine.scheduler.num_preemptions > 0


def test_decodes_keep_one_step_ahead():
    """A running request is scheduled in every step: nothing waits for its token to be read."""
    engine = FakeEngine(LIMITS, 64)
    engine.add("a", [1, 2, 3], 20, 20)
    engine.add("b", [4, 5], 20, 20)
    for _ in range(20):
        engine.step()
    assert [len(plan) for plan in engine.plans] == [2] * 20
    engine.step()
    assert engine.plans[-1] == [] and set(engine.outputs) == {"a", "b"}


def test_a_long_prompt_does_not_hold_up_those_that_run():
    engine = FakeEngine(limits(max_model_len=200), 100)
    engine.add("short", [1, 2], 40, 40)
    engine.step()
    engine.add("long", list(range(100, 200)), 4, 4)
    for _ in range(10):
        engine.step()
        assert [(id, count) for id, _, _, count, *_ in engine.plans[-1]] == [("short", 1), ("long", 7)]
    engine.drain()


def test_a_prompt_that_does_not_fit_waits_rather_than_start():
    """Its chunks would be thrown out for the tokens of those that run, and computed again and again."""
    engine = FakeEngine(limits(max_model_len=80), 21)
    engine.add("running", list(range(30)), 40, 40)
    engine.add("long", list(range(100, 170)), 4, 4)
    engine.drain()
    assert engine.scheduler.num_preemptions == 0
    assert sum(count for plan in engine.plans for _, _, _, count, *_ in plan) == 30 + 39 + 70 + 3


def test_tokens_of_an_aborted_request_do_not_reach_the_next_of_its_name():
    engine = FakeEngine(LIMITS, 64)
    engine.add("a", [1, 2, 3], 5, 5)
    engine.step()
    engine.abort("a")
    engine.add("a", [7, 8], 5, 5)
    engine.drain()  # checks every token
    assert len(engine.outputs["a"]) == 5


def test_what_can_never_run_is_refused():
    scheduler = Scheduler(LIMITS, PagePool(5))
    with pytest.raises(RequestError, match="max_model_len=32"):
        scheduler.add("a", 30, 3)
    with pytest.raises(RequestError, match="5 pages .* it has 4"):
        scheduler.add("a", 10, 7)
    scheduler.add("a", 10, 6)
    with pytest.raises(RequestError, match="priority=1 .* scheduling_policy='fcfs'"):
        scheduler.add("b", 1, 1, priority=1)
    scheduler.finish("nobody")
    scheduler.finish("a")
    assert not scheduler.has_work and not scheduler.schedule().scheduled
