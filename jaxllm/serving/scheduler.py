"""Which tokens of which requests run in the next step.

The scheduler has no clock, no randomness and no I/O: the same calls give the same plans. It knows counts of tokens, not
their values. A step is planned before the one before it has been read back, so `num_tokens` counts sampled tokens from the
moment that they are planned; `complete` says what became of them.

Every step serves running requests first, in order of arrival, then admits waiting ones while there are tokens in the budget,
places and pages; long prompts are computed in chunks (Agrawal et al., arXiv 2308.16369). When pages run out, the request
that came last gives up its pages and waits to be computed again: the oldest always advances, so every request ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.errors import RequestError
from jaxllm.serving.kv_cache import PagePool


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits, in requests and tokens. `recompute_beyond`: a sequence that outgrows this many tokens is computed anew, because
    its rotary angles change there (LongRoPE; transformers' `generate` drops its cache at the same place)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    recompute_beyond: int | None = None


@dataclass(eq=False)
class Sequence:
    """What the scheduler knows of a request."""

    request_id: str
    num_prompt: int
    max_tokens: int
    num_tokens: int = 0  # prompt and outputs, those in flight included
    num_computed: int = 0  # whose keys and values are in the cache when the planned steps have run
    in_flight: int = 0  # sampled tokens that have not been read back
    pages: tuple[int, ...] = ()  # never changed in place: plans share it
    slot: int = -1  # its row in the device's table of last tokens, while it runs
    preemptions: int = 0
    outgrown: bool = False  # it has passed `recompute_beyond`
    page_names: list[bytes] = field(default_factory=list)  # of its full pages, as far as their tokens are known
    num_published: int = 0  # pages that others can share
    num_cached: int = 0  # tokens that it found computed when it was first admitted
    ended: bool = False  # finished or aborted; a step in flight may still have it

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.num_prompt


class ScheduledSequence(NamedTuple):
    """Tokens `start` to `start + count` of a request; `samples`: they are its last, and one more is drawn after them."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    num_tokens: int  # of the request, when this was planned
    pages: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """Sequences with one token come first: attention has a faster path for them."""

    scheduled: tuple[ScheduledSequence, ...]
    num_decode: int
    num_tokens: int


class Scheduler:
    def __init__(self, config: SchedulerConfig, pool: PagePool):
        self.config, self.pool = config, pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def add(self, request_id: str, num_prompt: int, max_tokens: int, page_names: Iterable[bytes] = ()) -> None:
        """A new request of `num_prompt` tokens that will have at most `max_tokens` more. Raises RequestError if it can never run.

        `page_names` (`kv_cache.page_names` of the prompt) let it share pages with requests that begin alike.
        """
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
        if request_id in self._by_id:
            raise RequestError(f"there is a request {request_id!r} already")
        limit = self.config.recompute_beyond
        sequence = Sequence(request_id, num_prompt, max_tokens, num_tokens=num_prompt, outgrown=limit is not None and num_prompt > limit)
        sequence.page_names += page_names
        self._by_id[request_id] = sequence
        self.waiting.append(sequence)

    def finish(self, request_id: str) -> None:
        """Ends a request, finished or aborted, at any moment; what it holds is free for the next plan."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        sequence.ended = True
        if sequence.slot >= 0:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def name_pages(self, request_id: str, names: Iterable[bytes]) -> None:
        """The tokens of a request's next full pages are known."""
        self._by_id[request_id].page_names += names

    def num_cached_tokens(self, request_id: str) -> int:
        """Tokens of a request's prompt that were in the cache when it was admitted."""
        return self._by_id[request_id].num_cached

    def complete(self, plan: StepPlan) -> None:
        """The tokens that a plan sampled have been read."""
        for s in plan.scheduled:
            s.sequence.in_flight -= s.samples

    def schedule(self) -> StepPlan:
        """Plans the next step; empty when nothing can run before an earlier step is read."""
        budget = self.config.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            sequence = self.running[i]
            i += 1
            self._recompute_if_outgrown(sequence)
            count = min(self._num_ready(sequence), budget)
            if count == 0:
                continue
            while not self._reserve(sequence, sequence.num_computed + count):
                preempted = True
                self._preempt(self.running[-1])
                if sequence.slot < 0:
                    break
            else:
                scheduled.append(self._plan(sequence, count))
                budget -= count
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            self._recompute_if_outgrown(sequence)  # it may have grown past the limit in the step that it was thrown out of
            self._find_cached(sequence)
            count = min(self._num_ready(sequence), budget)
            # Room for all of it, not only its first chunk: else it is thrown out half computed, and computed again, many times.
            if count == 0 or not self._reserve(sequence, sequence.num_tokens):
                self._let_go(sequence)
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            scheduled.append(self._plan(sequence, count))
            budget -= count
        scheduled.sort(key=lambda s: s.count > 1)
        return StepPlan(tuple(scheduled), sum(s.count == 1 for s in scheduled), sum(s.count for s in scheduled))

    def _num_ready(self, sequence: Sequence) -> int:
        """Tokens that could be computed now."""
        if sequence.num_outputs >= sequence.max_tokens:
            return 0  # its last token is in flight
        pending = sequence.num_tokens - sequence.num_computed
        # A token in flight is known to the device as the last of its sequence only; anything else waits until it is read.
        return 0 if sequence.in_flight and pending > 1 else pending

    def _plan(self, sequence: Sequence, count: int) -> ScheduledSequence:
        start = sequence.num_computed
        sequence.num_computed += count
        if sequence.num_published < len(sequence.page_names):
            self._publish(sequence)
        samples = sequence.num_computed == sequence.num_tokens
        planned = ScheduledSequence(sequence, start, count, samples, sequence.num_tokens, sequence.pages)
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

    def _find_cached(self, sequence: Sequence) -> None:
        """Gives a waiting sequence the pages that hold its beginning already. Its last token is always computed: it has the logits."""
        pages = self.pool.find(sequence.page_names[: (sequence.num_tokens - 1) // self.config.page_size])
        self.pool.share(pages)
        sequence.pages, sequence.num_published = tuple(pages), len(pages)
        sequence.num_computed = len(pages) * self.config.page_size
        if not sequence.preemptions:
            sequence.num_cached = sequence.num_computed

    def _let_go(self, sequence: Sequence) -> None:
        """A sequence that waits holds nothing."""
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_published = (), 0, 0

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence pages for so many tokens, if there are enough."""
        missing = self._num_pages(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        if missing > self.pool.num_free:
            return False
        sequence.pages += tuple(self.pool.take(missing))
        return True

    def _release(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _recompute_if_outgrown(self, sequence: Sequence) -> None:
        limit = self.config.recompute_beyond
        if limit is not None and not sequence.outgrown and sequence.num_tokens > limit:
            sequence.outgrown, sequence.num_computed = True, 0
