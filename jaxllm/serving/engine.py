"""The engine: requests in, tokens and text out, a step at a time."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.errors import RequestError
from jaxllm.serving.bad_words import bad_words_token_ids
from jaxllm.serving.beam import Beam, start_beams
from jaxllm.serving.checks import check_params, check_prompt
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.host_tier import TieredPool
from jaxllm.serving.kv_cache import PagePool, page_names, salt_name
from jaxllm.serving.loading import load
from jaxllm.serving.logits import LogitsProcessor
from jaxllm.serving.logprobs import TokenLogprobs
from jaxllm.serving.output import TextStream
from jaxllm.serving.policies import needs_profile, with_profile
from jaxllm.serving.pooling import add_rows, check_pooling, embedding
from jaxllm.serving.programs import NO_TOKEN
from jaxllm.serving.progress import ProgressLine
from jaxllm.serving.replay import RecordingScheduler, open_record
from jaxllm.serving.request import Completion, Logprob, Request, RequestMetrics, RequestOutput, SamplingParams, completion_seed
from jaxllm.serving.runner import Launched
from jaxllm.serving.scheduler import Scheduler, StepPlan
from jaxllm.serving.slot_state import check_slot, packed
from jaxllm.serving.structured import Grammars, Matcher


@dataclass
class EngineStats:
    """Sums over all steps so far: their number, the tokens drawn, the seconds that the host spent on them rather than waiting
    for the device, the tokens that the KV cache's pages in use had room for, and how many of those places were empty
    (`Scheduler.kv_use`)."""

    steps: int = 0
    tokens: int = 0
    host_s: float = 0.0
    kv_places: int = 0
    kv_empty: int = 0

    @property
    def kv_waste(self) -> float:
        """The share of the pages in use that held no token."""
        return self.kv_empty / max(1, self.kv_places)


class Engine:
    """Runs many requests together. Not thread-safe: one thread adds, steps and aborts."""

    def __init__(self, config: EngineConfig, logits_processors: Mapping[str, LogitsProcessor] | None = None):
        """`logits_processors`: functions in JAX that requests may name, see `logits.LogitsProcessor`."""
        self.config = config
        record = None if config.record is None else open_record(config.record)  # before the seconds of loading
        loaded = load(config, logits_processors)
        self.runner, self.limits, self.tokenizer = loaded.runner, loaded.limits, loaded.tokenizer
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size = self.runner.model.config.vocab_size
        self.pool = TieredPool(loaded.num_pages, loaded.host_pages) if loaded.host_pages else PagePool(loaded.num_pages)
        self._requests: dict[str, Request] = {}
        self._completions: dict[int, Completion] = {}  # that are not finished
        self._grammars = Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)
        self._in_flight: deque[tuple[StepPlan, Launched]] = deque()
        self._num_added = 0  # requests
        self._num_completions = 0
        # Keys that depend on the length of their sequence are another's only if its length is the same.
        fixed = not any(rope.depends_on_length for rope in self.runner.model.config.ropes.values())
        self._shares_pages = config.enable_prefix_caching and fixed
        self.stats = EngineStats()
        self.on_step: Callable[[int], None] | None = None  # is told how many tokens a step has, on the thread that steps
        self.on_read: Callable[[StepPlan], None] | None = None  # is told of each step that has been read, likewise
        self.load_s = loaded.load_s
        if config.warmup:
            background = loaded.exact if config.warmup_in_background is None else config.warmup_in_background
            profiled = needs_profile(self.limits.policy, self.limits.policy_options)
            self.runner.warm_up(ProgressLine("compiling", "programs"), background=background and not profiled)
            if profiled:
                options = with_profile(self.limits.policy, self.limits.policy_options, *self.runner.profile())
                self.limits = replace(self.limits, policy_options=options)
        self.scheduler = Scheduler(self.limits, self.pool) if record is None else RecordingScheduler(self.limits, self.pool, record)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_requests(self) -> int:
        """That are not finished."""
        return len(self._requests)

    def add_request(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
        tenant: str = "",
        pooling: str | None = None,
        matcher: Matcher | None = None,
    ) -> str:
        """Queues a request and returns its id. Raises RequestError if it cannot be served.

        It shares the KV cache with requests of the same `cache_salt` only. `tenant`: whom it is for; policies may share out by it.
        `pooling`: `last` or `mean`, for a request of one token whose output has an `embedding`.
        `matcher`: what `matcher(params)` has made, which takes time.
        """
        ids = check_prompt(prompt_token_ids, params, vocab_size=self.vocab_size, max_model_len=self.limits.max_model_len)
        check_params(
            params,
            vocab_size=self.vocab_size,
            max_logprobs=self.runner.programs.num_logprobs,
            has_tokenizer=self.tokenizer is not None,
            processors=self.runner.processors,
        )
        check_pooling(pooling, params)
        number = self._num_added
        if request_id is None:
            request_id = next(name for i in itertools.count(number) if (name := str(i)) not in self._requests)
        elif request_id in self._requests:
            raise RequestError(f"there is a request {request_id!r} already")
        request = Request(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=ids,
            params=params,
            max_tokens=self.limits.max_model_len - len(ids) if params.max_tokens is None else params.max_tokens,
            stop_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            metrics=RequestMetrics(time.monotonic()),
            bad_words=bad_words_token_ids(self.tokenizer, params.bad_words) if params.bad_words else (),
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(ids),
            salt=salt_name(cache_salt),
            matcher=self.matcher(params) if matcher is None else matcher,
            tenant=tenant,
            pooling=pooling,
        )
        seed = params.seed if params.seed is not None else _derive_seed(self.config.seed, number)
        # Prompt log-probabilities and a mean need every token of the prompt computed.
        shares = self._shares_pages and params.prompt_logprobs is None and pooling != "mean"
        names = page_names(ids, self.limits.page_size, request.salt) if shares else None
        if params.use_beam_search:
            self.scheduler.check(len(ids), request.max_tokens, params.priority)  # each of its sequences is shorter
            request.beams, request.params = start_beams(request, self.eos_token_ids, self.runner.programs.num_logprobs)
            self._add_completion(request, seed, names, request.beams.live[0])
        else:
            first = self._add_completion(request, seed, names)
            for i in range(1, params.n):  # they differ from the last token of the prompt on, which each draws from for itself
                self._add_completion(request, completion_seed(seed, i), names, fork_of=first.number, common=len(ids) - 1)
        self._requests[request_id] = request
        self._num_added += 1
        return request_id

    def _add_completion(self, request: Request, seed: int, names: list[bytes] | None, beam: Beam | None = None, **fork: int) -> Completion:
        """One more sequence of a request. Raises RequestError for the first if it cannot be served.

        That of a beam has the beam's tokens, draws the one after them, and has no text.
        """
        number, params = self._num_completions, request.params
        text = TextStream(self.tokenizer if beam is None else None, params, request.prompt_token_ids)
        completion = Completion(number, request, len(request.completions), seed, text, None if names is None else list(names))
        if request.matcher is not None:
            completion.matcher = request.matcher.copy()
        if beam is not None:
            completion.output_token_ids = list(beam.token_ids)
        num_outputs, max_tokens = (0, request.max_tokens) if beam is None else (len(beam.token_ids), len(beam.token_ids) + 1)
        if params.logprobs is not None:
            completion.logprobs, completion.cumulative_logprob = [], 0.0
        check_slot(completion, self.vocab_size)
        options = dict(num_outputs=num_outputs, priority=params.priority, tenant=request.tenant, now=time.monotonic(), **fork)
        self.scheduler.add(number, len(request.prompt_token_ids), max_tokens, names or (), **options)
        self._num_completions += 1
        self._completions[number] = completion
        request.completions.append(completion)
        return completion

    def completion(self, number: int) -> Completion:
        """One that is not finished, by the scheduler's name for it."""
        return self._completions[number]

    def matcher(self, params: SamplingParams) -> Matcher | None:
        """Of a request's structured output, on any thread. Raises RequestError."""
        return None if params.structured_outputs is None else self._grammars.matcher(params.structured_outputs)

    def abort(self, request_id: str) -> None:
        """Ends a request at once, whatever its state; an unknown one is ignored, as it may have just finished."""
        request = self._requests.pop(request_id, None)
        for completion in request.completions if request is not None else ():
            self._end(completion)

    def _end(self, completion: Completion) -> None:
        """The device has nothing more to do for it, and what it held is free."""
        if self._completions.pop(completion.number, None) is not None:
            self.scheduler.finish(completion.number)

    def step(self) -> list[RequestOutput]:
        """Starts the next step, then reads the one before it; returns the requests that have something new."""
        start, outputs = time.perf_counter(), []
        plan = self.scheduler.schedule(time.monotonic())
        if plan.scheduled:
            prepared = self.runner.prepare(plan, self._completions)
            self._note(plan)
            places, empty = self.scheduler.kv_use()
            self.stats.kv_places += places
            self.stats.kv_empty += empty
            self.stats.host_s += time.perf_counter() - start
            self.stats.steps += 1
            structured = any(s.samples and self._completions[s.sequence.id].matcher is not None for s in plan.scheduled)
            launched = self.runner.launch(prepared, (lambda: self._masks(plan, outputs)) if structured else None)
            self._in_flight.append((plan, launched))
        if self._in_flight and (len(self._in_flight) > 1 or not plan.scheduled):
            outputs += self._read_oldest()
        elif self._requests and not self._in_flight:
            raise RuntimeError(f"the scheduler has stalled with {len(self._requests)} requests: this is a bug in jaxllm, please report it")
        return outputs

    def _read_oldest(self) -> list[RequestOutput]:
        plan, launched = self._in_flight.popleft()
        launched = jax.device_get(launched)  # waits for the device
        start = time.perf_counter()
        outputs = self._read(plan, launched)
        self.stats.host_s += time.perf_counter() - start
        if self.on_read is not None:
            self.on_read(plan)
        return outputs

    def _masks(self, plan: StepPlan, outputs: list[RequestOutput]) -> tuple[list[int], np.ndarray]:
        """Slots of a plan whose tokens have a grammar, and what it allows there. That depends on the tokens of the step before,
        which is read now; what it gave is added to `outputs`."""
        while self._in_flight:
            outputs += self._read_oldest()
        rows = [(s.sequence.slot, c) for s in plan.scheduled if s.samples and (c := self._completions.get(s.sequence.id)) and c.matcher]
        if not rows:
            return [], np.empty((0, 0), np.uint32)
        start = time.perf_counter()
        masks = self._grammars.masks([completion.matcher for _, completion in rows])
        for mask, (_, completion) in zip(masks, rows, strict=True):
            if (allowed := completion.request.params.allowed_token_ids) is not None:
                mask &= packed(allowed, self.vocab_size)
        self.stats.host_s += time.perf_counter() - start
        return [slot for slot, _ in rows], masks

    def _note(self, plan: StepPlan) -> None:
        """For those who measure."""
        now = time.monotonic()
        for s in plan.scheduled:
            if s.admitted and (times := self._completions[s.sequence.id].request.metrics).scheduled_time is None:
                times.scheduled_time = now
        if self.on_step is not None:
            self.on_step(plan.num_tokens)

    def _read(self, plan: StepPlan, launched: Launched) -> list[RequestOutput]:
        self.scheduler.complete(plan)
        now = time.monotonic()
        for rows, logprobs in launched.prompt_logprobs:
            if (completion := self._completions.get(rows.sequence)) is not None:
                request = completion.request
                for i, token in enumerate(rows.tokens):
                    request.prompt_logprobs[rows.start + i] = self._logprobs(logprobs, i, token, request.params.prompt_logprobs)
        for rows, total in launched.pooled:
            if (completion := self._completions.get(rows.sequence)) is not None:
                add_rows(completion.request, total)
        advanced: dict[str, Request] = {}
        for row, (scheduled, token) in enumerate(zip(plan.scheduled, launched.tokens.tolist(), strict=False)):  # the rest is padding
            if scheduled.samples and not scheduled.sequence.ended:  # it may have been aborted since
                completion = self._completions[scheduled.sequence.id]
                advanced[completion.request.request_id] = completion.request
                if token == NO_TOKEN:
                    self._fail(completion.request)
                    continue
                if completion.logprobs is not None:
                    asked = self._logprobs(launched.logprobs, row, token, completion.request.params.logprobs)
                    completion.logprobs.append(asked)
                    completion.cumulative_logprob += asked[token].logprob
                self._advance(completion, token, now)
        return [self._output(request, now) for request in advanced.values() if request.beams is None or request.beams.over]

    def _advance(self, completion: Completion, token: int, now: float) -> None:
        """One more token of a sequence: its text, and whether it ends here."""
        request, text = completion.request, completion.text
        completion.output_token_ids.append(token)
        self.stats.tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        request.metrics.last_token_time = now
        if completion.index == 0 and len(completion.output_token_ids) == 1:  # the others are its forks
            request.num_cached_tokens = self.scheduler.num_cached_tokens(completion.number)
        if request.beams is not None:
            self._advance_beam(completion)
            return
        if token in request.stop_token_ids:
            completion.finish_reason = "stop"
            completion.stop_reason = None if token in self.eos_token_ids else token
        elif (stop := text.add(token)) is not None:
            completion.finish_reason, completion.stop_reason = "stop", stop
        elif completion.matcher is not None and completion.matcher.take(token):
            completion.finish_reason = "stop" if completion.matcher.error is None else "error"
            completion.stop_reason = completion.matcher.error
        elif len(completion.output_token_ids) >= request.max_tokens:
            completion.finish_reason = "length"
        if completion.finish_reason is None:
            self._name_page(completion)
            return
        if (stop := text.finish()) is not None and completion.stop_reason is None and completion.finish_reason == "length":
            completion.finish_reason, completion.stop_reason = "stop", stop
        self._end(completion)

    def _fail(self, request: Request) -> None:
        """Ends a request from whose logits nothing can be drawn: any token would be made up."""
        request.beams = None
        for completion in request.completions:
            if completion.finish_reason is None:
                why = completion.matcher.error if completion.matcher is not None else None
                completion.finish_reason = "error"
                completion.stop_reason = why or "the logits have a NaN or +inf, or nothing but -inf"
            self._end(completion)

    def _advance_beam(self, completion: Completion) -> None:
        """A beam has drawn. When all live ones have, the next ones go on from their pages, or the search is over."""
        request, beams = completion.request, completion.request.beams
        self.scheduler.retire(completion.number)
        if not beams.add(completion.index, completion.number, completion.logprobs[-1]):
            return
        sources = {source.number: source for source in request.completions}
        beams.advance()
        request.completions = []
        if beams.over:
            request.completions = [self._beam_result(request, i, beam) for i, beam in enumerate(beams.best())]
        else:
            for beam in beams.live:
                tokens, names = request.prompt_token_ids + beam.token_ids, sources[beam.source].page_names
                if names is not None:
                    start = len(names) * self.limits.page_size
                    names = names + page_names(tokens[start:], self.limits.page_size, names[-1] if names else request.salt)
                self._add_completion(request, completion.seed, names, beam, fork_of=beam.source, common=len(tokens) - 1)
        for source in sources.values():
            self._end(source)

    def _beam_result(self, request: Request, index: int, beam: Beam) -> Completion:
        text = TextStream(self.tokenizer, request.params, request.prompt_token_ids)
        for token in beam.token_ids[:-1] if beam.finish_reason == "stop" else beam.token_ids:
            text.add(token)
        text.finish()
        completion = Completion(beam.source, request, index, 0, text, None, beam.token_ids, beam.finish_reason, beam.stop_reason)
        completion.logprobs, completion.cumulative_logprob = beam.logprobs, beam.cumulative_logprob
        return completion

    def _logprobs(self, logprobs: TokenLogprobs, row: int, token: int, k: int) -> dict[int, Logprob]:
        """Of a token and of the k likeliest in its place."""
        decoded = lambda i: self.tokenizer.decode([i]) if self.tokenizer is not None and self.tokenizer.has_token(i) else None
        result = {token: Logprob(float(logprobs.logprob[row]), int(logprobs.rank[row]), decoded(token))}
        for rank in range(k):
            likely = int(logprobs.top_ids[row, rank])
            result.setdefault(likely, Logprob(float(logprobs.top_logprobs[row, rank]), rank + 1, decoded(likely)))
        return result

    def _output(self, request: Request, now: float) -> RequestOutput:
        output = request.output()
        if output.finished:
            if request.hidden_sum is not None:
                output.embedding = embedding(request)
            request.metrics.finished_time = now
            del self._requests[request.request_id]
        return output

    def _name_page(self, completion: Completion) -> None:
        """Tells the scheduler of the page that the newest token has filled, if it has."""
        size, names = self.limits.page_size, completion.page_names
        if names is None or (len(completion.request.prompt_token_ids) + len(completion.output_token_ids)) % size:
            return
        new = page_names(completion.token_ids[-size:], size, names[-1] if names else completion.request.salt)
        names += new
        self.scheduler.name_pages(completion.number, new)

    def drain(self) -> None:
        """Reads the steps that are still under way when all requests have ended."""
        while self._in_flight:
            self._read_oldest()

    def close(self) -> None:
        """Writes out the record, if one is made, and compiles no further; the engine can run no more then."""
        self.runner.close()
        if isinstance(self.scheduler, RecordingScheduler):
            self.scheduler.close()

    def reset_prefix_cache(self) -> None:
        """Forgets all that finished requests left in the KV cache."""
        self.scheduler.reset_prefix_cache()


def _derive_seed(seed: int, number: int) -> int:
    """A seed for a request that brought none: its own, and the same in every run with the same engine seed and order."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big")
