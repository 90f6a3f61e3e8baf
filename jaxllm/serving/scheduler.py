"""Which tokens of which requests run in the next step.

The scheduler has no clock, no randomness and no I/O: the same calls give the same plans. It knows counts of tokens, not
their values. A step is planned before the one before it has been read back, so `num_tokens` counts sampled tokens from the
moment that they are planned; `complete` says what became of them.

Every step serves running sequences first, in the order of their ranks (`policies`), then admits waiting ones while there are
tokens in the budget, places and pages; long prompts are computed in chunks (Agrawal et al., arXiv 2308.16369). When pages run
out, the sequence of the last rank gives up its pages and waits to be computed again: the first always advances, so all end.
Pages that it has filled stay in the prefix cache until others need the room, so that what waits and what is cached are one thing.

Ranks of some policies change with time, which comes in as an argument, and some let a waiting sequence take the place of one that
runs: of the last ranks, no more of them than make room for it, and none before it has drawn a token since it was admitted, so
that every turn brings all nearer to their ends (`preemption.py`).

A fork begins with tokens of another sequence, its source (Kwon et al., arXiv 2309.06180, section 4.4): it shares the pages
that those fill, and gets a copy of the page that they fill in part, made by the runner before the step that first writes to it.
A fork waits until a plan before its own has computed what it takes over. A source that has ended keeps its pages until its
forks have them, unless others need the room: then the forks compute everything themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxllm.errors import RequestError
from jaxllm.serving.host_tier import TieredPool
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.policies import NEVER, Book, Rank, Ranked, Tenant, make_policy
from jaxllm.serving.preemption import find_victims


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits, in requests and tokens. `recompute_beyond`: a sequence that outgrows this many tokens is computed anew, because
    its rotary angles change there (LongRoPE; transformers' `generate` drops its cache at the same place)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    recompute_beyond: int | None = None
    policy: str = "fcfs"
    policy_options: dict[str, Any] = field(default_factory=dict)  # constants of the policy, by name


@dataclass(eq=False, slots=True)
class Sequence:
    """What the scheduler knows of a sequence: a request's prompt and one continuation of it."""

    id: int
    num_prompt: int
    max_tokens: int
    arrival: int  # of its request: how many sequences had come
    number: int  # its own, likewise
    priority: int
    tenant: Tenant
    arrived: float  # seconds, by the clock of `schedule`'s callers
    rank: Rank = ()
    num_tokens: int = 0  # prompt and outputs, those in flight included
    num_computed: int = 0  # whose keys and values are in the cache when the planned steps have run
    in_flight: int = 0  # sampled tokens that have not been read back
    pages: tuple[int, ...] = ()  # never changed in place: plans share it
    promised: int = 0  # free pages that nobody else may take: for the rest of its prompt
    slot: int = -1  # its row in the device's tables, while it runs
    preemptions: int = 0
    outgrown: bool = False  # it has passed `recompute_beyond`
    page_names: list[bytes] = field(default_factory=list)  # of its full pages, as far as their tokens are known
    num_published: int = 0  # pages that others can share
    num_cached: int = 0  # tokens that it found computed when it was first admitted
    retired: bool = False  # it draws no more; its pages are there for forks
    ended: bool = False  # finished or aborted; a step in flight may still have it
    source: "Sequence | None" = None  # until it is admitted: the one whose first `common` tokens it begins with
    common: int = 0
    num_forks: int = 0  # whose source it is
    parked: list["Sequence"] = field(default_factory=list)  # those of them that it has not computed enough for
    num_known: int = 0  # of its tokens, those that it had when it was last admitted
    service: float = 0.0  # seconds that it has run
    turn: float = 0.0  # seconds at which it last began to run, or to wait
    to_fetch: int = 0  # of its pages, those that come from host memory: not yet there while it is being admitted
    level: int = 0  # what a policy remembers
    spent: float = 0.0  # likewise
    due: float = 0.0  # likewise


class ScheduledSequence(NamedTuple):
    """Tokens `start` to `start + count` of a sequence; `samples`: they are its last, and one more is drawn after them."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    num_tokens: int  # of the sequence, when this was planned
    pages: tuple[int, ...]
    admitted: bool  # it did not run before: its slot is new to it


@dataclass(frozen=True)
class StepPlan:
    """Sequences with one token come first: attention has a faster path for them.

    Before the step, in this order: `saves` are (page, slot in host memory) to copy there, `fetches` (slot, page) to copy from there,
    `copies` pages (from, to) to copy, one after the other.
    """

    scheduled: tuple[ScheduledSequence, ...]
    num_decode: int
    num_tokens: int
    copies: tuple[tuple[int, int], ...] = ()
    saves: tuple[tuple[int, int], ...] = ()
    fetches: tuple[tuple[int, int], ...] = ()


class Scheduler:
    def __init__(self, config: SchedulerConfig, pool: PagePool):
        self.config, self.pool, self.tiered = config, pool, isinstance(pool, TieredPool)
        self.waiting, self.running = Ranked(), Ranked()
        self.policy = make_policy(config.policy, config.policy_options)
        self.book = Book()
        self._now = 0.0  # when the last plan was made
        self._served: list[Sequence] = []  # by it
        self.next_review = 0.0 if self.policy.timed else NEVER  # seconds
        self._unsettled = False  # something has come, ended or been ranked anew since it was last asked who may take whose place
        self._by_id: dict[int, Sequence] = {}
        self._kept: dict[Sequence, None] = {}  # that run no more and hold pages for forks, the oldest first
        self._unparked: list[Sequence] = []  # by this plan, so for the next
        self._starts: dict[Sequence, int] = {}  # of sources in the plan in the making: the tokens that earlier ones have computed
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self._promised = 0  # free pages, to all sequences together
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def check(self, num_prompt: int, max_tokens: int, priority: int = 0) -> None:
        """Raises RequestError for a sequence that can never run."""
        total = num_prompt + max_tokens
        if total > self.config.max_model_len:
            raise RequestError(
                f"{num_prompt} prompt tokens and {max_tokens} more exceed max_model_len={self.config.max_model_len}: "
                "shorten the prompt or lower max_tokens"
            )
        if (need := self._num_pages(total)) > self.pool.capacity:
            raise RequestError(
                f"{total} tokens need {need} pages of the KV cache and it has {self.pool.capacity}: "
                "raise num_pages or kv_cache_memory_bytes"
            )
        if priority and not self.policy.uses_priority:
            name = self.config.policy
            raise RequestError(f"priority={priority} means nothing with scheduling_policy={name!r}: leave it out, or use 'priority'")

    def add(
        self,
        id: int,
        num_prompt: int,
        max_tokens: int,
        page_names: Iterable[bytes] = (),
        *,
        num_outputs: int = 0,
        priority: int = 0,
        fork_of: int | None = None,
        common: int = 0,
        tenant: str = "",
        now: float = 0.0,
    ) -> None:
        """A new sequence of `num_prompt` tokens that will have at most `max_tokens` more, of which it has `num_outputs` already.

        `page_names` (`kv_cache.page_names`) let it share pages with those that begin alike. `fork_of`: it begins with the first
        `common` tokens of that sequence, if there is such a one. `tenant`: whom it is for; `now`: the moment,
        in seconds. Raises RequestError if it can never run.
        """
        self.check(num_prompt, max_tokens, priority)
        assert id not in self._by_id and 0 <= num_outputs < max_tokens
        self._num_added += 1
        source = self._by_id.get(fork_of)
        arrival = self._num_added if source is None else source.arrival
        num_tokens, limit = num_prompt + num_outputs, self.config.recompute_beyond
        arrived = now if source is None else source.arrived
        member = self.book.join(tenant)
        sequence = Sequence(
            id, num_prompt, max_tokens, arrival, self._num_added, priority, member, arrived, num_tokens=num_tokens, turn=now
        )
        sequence.rank = self.policy.rank(sequence, self.book, now)
        self.next_review = min(self.next_review, self.policy.due(sequence, now))
        self._unsettled = True
        sequence.outgrown = limit is not None and num_tokens > limit
        sequence.page_names += page_names
        self._by_id[id] = sequence
        if source is not None and limit is None:  # else the source may compute its pages anew
            sequence.source, sequence.common = source, min(common, num_tokens - 1)  # the last token is always computed: it has the logits
            source.num_forks += 1
            if self._must_park(sequence):
                source.parked.append(sequence)
                return
        self.waiting.add(sequence)

    def finish(self, id: int) -> None:
        """Ends a sequence, finished or aborted, at any moment; what it holds is free for the next plan."""
        sequence = self._by_id.pop(id, None)
        if sequence is None:
            return
        self._stop(sequence)
        sequence.ended = True
        self.book.leave(sequence, sequence.num_tokens - sequence.num_prompt - sequence.in_flight)
        self._leave_source(sequence)
        if not sequence.num_forks:
            self._drop(sequence)

    def retire(self, id: int) -> None:
        """A sequence draws no more. Until `finish`, its pages stay for forks to come, unless others need them."""
        self._stop(self._by_id[id])

    def name_pages(self, id: int, names: Iterable[bytes]) -> None:
        """The tokens of a sequence's next full pages are known."""
        self._by_id[id].page_names += names

    def num_cached_tokens(self, id: int) -> int:
        """Tokens of a sequence that were in the cache when it was first admitted."""
        return self._by_id[id].num_cached

    def reset_prefix_cache(self) -> None:
        """Forgets what the pages hold that no sequence uses, and shares those in use with no newcomer."""
        self.pool.forget()

    def complete(self, plan: StepPlan) -> None:
        """The tokens that a plan sampled have been read."""
        for s in plan.scheduled:
            s.sequence.in_flight -= s.samples

    def kv_use(self) -> tuple[int, int]:
        """(tokens that the pages in use have room for, how many of those places are empty once the planned steps have run).

        Empty are the ends of each sequence's last page (Kwon et al., arXiv 2309.06180, section 3.1: internal fragmentation; nothing is
        reserved, as what is promised to the rest of a prompt still serves the prefix cache). Pages that sequences share are full.
        """
        size = self.config.page_size
        empty = sum(len(s.pages) * size - s.num_computed for held in (self.running, self._kept) for s in held)
        return (self.pool.capacity - self.pool.num_free) * size, empty

    def schedule(self, now: float = 0.0) -> StepPlan:
        """Plans the next step; empty when nothing can run before an earlier step is read. `now`: the moment, in seconds, never an
        earlier one than before."""
        timed = self.policy.timed
        if timed:
            self._review(now)
        if self._unsettled and self.policy.preempts:
            for sequence in find_victims(self, now):
                self._preempt(sequence)
        self._unsettled, self._now = False, now
        budget = self.config.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        copies: list[tuple[int, int]] = []
        fetches: list[tuple[int, int]] = []
        preempted = False
        i = 0
        size, recompute = self.config.page_size, self.config.recompute_beyond is not None
        running = self.running
        # A prompt of a good rank would take all tokens of a step. None of its chunks throws others out: its pages are promised (unless
        # it is computed anew while it runs).
        if timed and not recompute and any(s.num_tokens - s.num_computed > 1 for s in running):
            running = sorted(running, key=_has_many_pending)
        while i < len(running) and budget > 0:
            sequence = running[i]
            i += 1
            if recompute:
                self._recompute_if_outgrown(sequence)
            if (count := self._num_ready(sequence)) > budget:
                count = budget
            if count == 0 or sequence.slot < 0:
                continue
            while sequence.num_computed + count > size * len(sequence.pages) and not self.reserve(sequence, sequence.num_computed + count):
                preempted = True
                self._preempt(self.running[-1])
                if sequence.slot < 0:
                    break
            else:
                scheduled.append(self._plan(sequence, count))
                budget -= count
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            if self._must_park(sequence):
                source = self.waiting.pop(0).source
                (self._unparked if source.num_computed >= sequence.common else source.parked).append(sequence)
                continue
            if recompute:
                self._recompute_if_outgrown(sequence)  # it may have grown past the limit in the step that it was thrown out of
            copy_from = self._find_computed(sequence)
            # The device knows a token that is in flight by its slot; who gave way in this plan has lost it.
            count = 0 if sequence.in_flight else min(self._num_ready(sequence), budget)
            # Room for all of it, not only its first chunk: else it is thrown out half computed, and computed again, many times.
            if count == 0 or not self.reserve(sequence, sequence.num_computed + count, then=sequence.num_tokens):
                self._let_go(sequence)
                break
            if sequence.to_fetch:
                fetches += self._fetch(sequence)
            if copy_from is not None:
                copies.append((copy_from, sequence.pages[sequence.num_computed // size]))
            self.waiting.pop(0)
            self._leave_source(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.tenant.running += 1
            sequence.num_known, sequence.turn = sequence.num_tokens, now
            self.running.add(sequence)
            if timed:
                self.next_review = min(self.next_review, self.policy.due(sequence, now))
            scheduled.append(self._plan(sequence, count, admitted=True))
            budget -= count
        for sequence in self._unparked:
            self.waiting.add(sequence)
        self._unparked.clear()
        self._starts.clear()
        if timed:
            self._served = [s.sequence for s in scheduled]
        num_tokens = num_decode = self.config.max_num_batched_tokens - budget
        if num_tokens > len(scheduled):
            scheduled.sort(key=lambda s: s.count > 1)
            num_decode = sum(s.count == 1 for s in scheduled)
        saves = self.pool.take_saves() if self.tiered else ()
        return StepPlan(tuple(scheduled), num_decode, num_tokens, tuple(copies), saves, tuple(fetches))

    @property
    def num_unpromised(self) -> int:
        """Pages that nobody uses or is promised."""
        return self.pool.num_free - self._promised

    @property
    def settled(self) -> bool:
        """Whether the next plan decides as the last did, as long as nothing comes, ends or runs out, and no review is due."""
        return not (self._unsettled or self._kept or any(s.in_flight for s in self.waiting[:1]) or any(s.num_forks for s in self.running))

    def num_in_use(self, waiting: Sequence) -> int:
        """Pages that a waiting sequence begins with and that others use: it needs no more room for them."""
        names = waiting.page_names
        return self.pool.num_used(names[: (waiting.num_tokens - 1) // self.config.page_size]) if names else 0

    def _review(self, now: float) -> None:
        """Counts what the last plan has served, and ranks anew if it is time to."""
        elapsed = now - self._now
        for sequence in self._served:
            sequence.service += elapsed
        if now < self.next_review:
            return
        self.next_review = self.policy.review(self.running, self.waiting, self.book, now)
        self._unsettled = True

    def _num_ready(self, sequence: Sequence) -> int:
        """Tokens that could be computed now."""
        num_tokens = sequence.num_tokens
        if num_tokens >= sequence.num_prompt + sequence.max_tokens:
            return 0  # its last token is in flight
        pending = num_tokens - sequence.num_computed
        # A token in flight is known to the device as the last of its sequence only; anything else waits until it is read.
        return 0 if sequence.in_flight and pending > 1 else pending

    def _plan(self, sequence: Sequence, count: int, admitted: bool = False) -> ScheduledSequence:
        start = sequence.num_computed
        if sequence.num_forks:
            self._starts[sequence] = start
        sequence.num_computed += count
        if sequence.num_published < len(sequence.page_names):
            self._publish(sequence)
        if sequence.parked:
            self._unpark(sequence, sequence.num_computed)
        samples = sequence.num_computed == sequence.num_tokens
        planned = _make(ScheduledSequence, (sequence, start, count, samples, sequence.num_tokens, sequence.pages, admitted))
        sequence.tenant.service += count + samples
        if samples:
            sequence.num_tokens += 1
            sequence.in_flight += 1
        return planned

    def _publish(self, sequence: Sequence) -> None:
        """Shares the pages that the planned steps fill: attention writes all that is new before it reads, in a step as between steps."""
        full = min(sequence.num_computed // self.config.page_size, len(sequence.page_names))
        for i in range(sequence.num_published, full):
            self.pool.publish(sequence.pages[i], sequence.page_names[i])
        sequence.num_published = max(sequence.num_published, full)

    def _find_computed(self, sequence: Sequence) -> int | None:
        """Gives a waiting sequence the pages that hold its beginning already, from its source or from the prefix cache.

        Its last token is always computed: it has the logits. Returns the page that it needs a copy of, if it begins in one.
        """
        size, source, copy_from = self.config.page_size, sequence.source, None
        names = sequence.page_names[: (sequence.num_tokens - 1) // size]
        pages = self.pool.find(names)
        sequence.to_fetch = self._num_to_fetch(sequence, names[len(pages) :]) if self.tiered else 0
        sequence.num_computed, sequence.num_published = (len(pages) + sequence.to_fetch) * size, len(pages)
        if source is not None and (common := min(sequence.common, self._computed_before(source))) > sequence.num_computed:
            pages, rest = list(source.pages[: common // size]), common % size
            sequence.num_computed, sequence.num_published, sequence.to_fetch = common, 0, 0
            copy_from = source.pages[common // size] if rest else None
        self.pool.share(pages)
        sequence.pages = tuple(pages)
        if not sequence.preemptions:
            sequence.num_cached = sequence.num_computed
        return copy_from

    def _num_to_fetch(self, sequence: Sequence, names: list[bytes]) -> int:
        """How many of the pages that follow those on the device host memory has; it keeps them until the plan is made."""
        n = self.pool.on_host(names)
        self.pool.pin(names[:n])
        return n

    def _fetch(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(slot, page) of the pages of a sequence that come from host memory. Others can share them from now on."""
        first = sequence.num_published
        sequence.num_published, sequence.to_fetch = first + sequence.to_fetch, 0
        return [self.pool.fetch(sequence.page_names[i], sequence.pages[i]) for i in range(first, sequence.num_published)]

    def _computed_before(self, source: Sequence) -> int:
        """Tokens that plans before this one have computed; those of this one can be shared, but not copied."""
        return self._starts.get(source, source.num_computed)

    def _must_park(self, sequence: Sequence) -> bool:
        """Whether a fork waits for its source to compute what they have in common."""
        source = sequence.source
        return source is not None and not (source.retired or source.ended) and self._computed_before(source) < sequence.common

    def _unpark(self, source: Sequence, num_computed: int) -> None:
        self._unparked += [fork for fork in source.parked if fork.common <= num_computed]
        source.parked = [fork for fork in source.parked if fork.common > num_computed]

    def _leave_source(self, sequence: Sequence) -> None:
        """A fork needs its source no more: it has been admitted, or has ended."""
        source, sequence.source = sequence.source, None
        if source is not None:
            source.num_forks -= 1
            if source.ended and not source.num_forks:
                self._drop(source)

    def _stop(self, sequence: Sequence) -> None:
        """Takes a sequence from wherever it runs or waits. What it has computed stays for forks."""
        if sequence.slot >= 0:
            self._leave_place(sequence)
            self._promise(sequence, 0)
            self._kept[sequence] = None
            self._unsettled = True
        elif sequence.source is not None and sequence in sequence.source.parked:
            sequence.source.parked.remove(sequence)
        elif not sequence.retired:
            self.waiting.remove(sequence)
        sequence.retired = True
        for fork in sequence.parked:
            self.waiting.add(fork)
        sequence.parked = []

    def _leave_place(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.tenant.running -= 1

    def _drop(self, sequence: Sequence) -> None:
        """Frees what a sequence that runs no more was keeping."""
        self._kept.pop(sequence, None)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """A sequence that waits holds nothing."""
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_published, sequence.to_fetch = (), 0, 0, 0
        self._promise(sequence, 0)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def reserve(self, sequence: Sequence, num_tokens: int, then: int = 0) -> bool:
        """Gives the sequence pages for so many tokens, and promises it those for `then` so many, if there are enough."""
        held = len(sequence.pages)
        missing = max(0, self._num_pages(num_tokens) - held)
        promised = max(0, sequence.promised - missing, self._num_pages(then) - held - missing)
        others = self._promised - sequence.promised
        while missing + promised + others > self.pool.num_free and self._kept:
            self._drop(next(iter(self._kept)))
        if missing + promised + others > self.pool.num_free:
            return False
        sequence.pages += tuple(self.pool.take(missing))
        self._promise(sequence, promised)
        return True

    def _promise(self, sequence: Sequence, pages: int) -> None:
        self._promised += pages - sequence.promised
        sequence.promised = pages

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_place(sequence)
        self._let_go(sequence)
        self._unsettled = True
        sequence.turn = self._now
        sequence.preemptions += 1
        self.num_preemptions += 1
        sequence.rank = self.policy.rank_again(sequence, self.book, self._now)
        self.waiting.add(sequence)
        self.next_review = min(self.next_review, self.policy.due(sequence, self._now))

    def _recompute_if_outgrown(self, sequence: Sequence) -> None:
        limit = self.config.recompute_beyond
        if limit is not None and not sequence.outgrown and sequence.num_tokens > limit:
            sequence.outgrown, sequence.num_computed = True, 0


_make = tuple.__new__  # half of what the class's own takes: this is made for each sequence of each step


def _has_many_pending(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed > 1
