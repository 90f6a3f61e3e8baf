"""The engine: requests in, tokens and text out, a step at a time."""

import hashlib
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import jax
import numpy as np

from jaxllm.errors import RequestError
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.kv_cache import PagePool, page_names
from jaxllm.serving.loading import load
from jaxllm.serving.output import TextStream
from jaxllm.serving.request import CompletionOutput, Request, RequestMetrics, RequestOutput, SamplingParams
from jaxllm.serving.scheduler import Scheduler, StepPlan
from jaxllm.tokenizers import Tokenizer


@dataclass
class EngineStats:
    """Of all steps so far: their number, and the seconds that the host spent on them rather than waiting for the device."""

    steps: int = 0
    host_s: float = 0.0


class Engine:
    """Runs many requests together. Not thread-safe: one thread adds, steps and aborts."""

    def __init__(self, config: EngineConfig):
        self.config = config
        loaded = load(config)
        self.runner, self.limits, self.tokenizer = loaded.runner, loaded.limits, loaded.tokenizer
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size = self.runner.model.config.vocab_size
        self.pool = PagePool(loaded.num_pages)
        self.scheduler = Scheduler(self.limits, self.pool)
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, TextStream] = {}
        self._in_flight: deque[tuple[StepPlan, jax.Array]] = deque()
        self._num_added = 0
        # Keys that depend on the length of their sequence are another's only if its length is the same.
        fixed = not any(rope.depends_on_length for rope in self.runner.model.config.ropes.values())
        self._shares_pages = config.enable_prefix_caching and fixed
        self.stats = EngineStats()
        self.load_s = loaded.load_s
        if config.warmup:
            self.runner.warm_up()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add_request(
        self, prompt_token_ids: Seq[int], params: SamplingParams, *, prompt: str | None = None, request_id: str | None = None
    ) -> str:
        """Queues a request and returns its id. Raises RequestError if it cannot be served."""
        ids = self._check(prompt_token_ids, params)
        number, self._num_added = self._num_added, self._num_added + 1
        request_id = request_id if request_id is not None else str(number)
        room = self.limits.max_model_len - len(ids)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        text = TextStream(self.tokenizer, params, ids)
        names = page_names(ids, self.limits.page_size) if self._shares_pages else None
        self.scheduler.add(request_id, len(ids), max(1, max_tokens), names or ())  # the last that may refuse: nothing is half added
        self._requests[request_id] = Request(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=ids,
            params=params,
            seed=params.seed if params.seed is not None else _derive_seed(self.config.seed, number),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            metrics=RequestMetrics(time.monotonic()),
            page_names=names,
        )
        self._texts[request_id] = text
        return request_id

    def abort(self, request_id: str) -> None:
        """Ends a request at once, whatever its state; an unknown one is ignored, as it may have just finished."""
        if self._requests.pop(request_id, None) is not None:
            del self._texts[request_id]
            self.scheduler.finish(request_id)

    def step(self) -> list[RequestOutput]:
        """Starts the next step, then reads the one before it; returns the requests that have something new."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan.scheduled:
            prepared = self.runner.prepare(plan, self._requests)
            self.stats.host_s += time.perf_counter() - start
            self.stats.steps += 1
            self._in_flight.append((plan, self.runner.launch(*prepared)))
        if self._in_flight and (len(self._in_flight) > 1 or not plan.scheduled):
            plan, drawn = self._in_flight.popleft()
            tokens = np.asarray(drawn).tolist()  # waits for the device
            start = time.perf_counter()
            outputs = self._read(plan, tokens)
            self.stats.host_s += time.perf_counter() - start
            return outputs
        if self._requests and not self._in_flight:
            raise RuntimeError(f"the scheduler has stalled with {len(self._requests)} requests: this is a bug in jaxllm, please report it")
        return []

    def _read(self, plan: StepPlan, tokens: list[int]) -> list[RequestOutput]:
        self.scheduler.complete(plan)
        now = time.monotonic()
        outputs = []
        for scheduled, token in zip(plan.scheduled, tokens, strict=False):  # rows past the last sequence are padding
            if scheduled.samples and not scheduled.sequence.ended:  # aborted since, and its name may be another's by now
                outputs.append(self._advance(self._requests[scheduled.sequence.request_id], token, now))
        return outputs

    def _advance(self, request: Request, token: int, now: float) -> RequestOutput:
        """One more token of a request: its text, and whether it ends here."""
        request.output_token_ids.append(token)
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        text = self._texts[request.request_id]
        if token in request.stop_token_ids:
            request.finish_reason = "stop"
            request.stop_reason = None if token in self.eos_token_ids else token
        elif (stop := text.add(token)) is not None:
            request.finish_reason, request.stop_reason = "stop", stop
        elif len(request.output_token_ids) >= request.max_tokens:
            request.finish_reason = "length"
        cached = self.scheduler.num_cached_tokens(request.request_id)
        if request.finish_reason is not None:
            if (stop := text.finish()) is not None and request.stop_reason is None and request.finish_reason == "length":
                request.finish_reason, request.stop_reason = "stop", stop
            request.metrics.finished_time = now
            self.abort(request.request_id)
        else:
            self._name_page(request)
        completion = CompletionOutput(0, text.text, list(request.output_token_ids), request.finish_reason, request.stop_reason)
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [completion],
            request.metrics,
            finished=request.finish_reason is not None,
            num_cached_tokens=cached,
        )

    def _name_page(self, request: Request) -> None:
        """Tells the scheduler of the page that the newest token has filled, if it has."""
        size = self.limits.page_size
        if request.page_names is None or (len(request.prompt_token_ids) + len(request.output_token_ids)) % size:
            return
        page = (request.prompt_token_ids + request.output_token_ids)[-size:]
        new = page_names(page, size, request.page_names[-1] if request.page_names else b"")
        request.page_names += new
        self.scheduler.name_pages(request.request_id, new)

    def reset_prefix_cache(self) -> None:
        """Forgets all that finished requests left in the KV cache."""
        self.pool.forget()

    def _check(self, prompt_token_ids: Seq[int], params: SamplingParams) -> list[int]:
        ids = list(prompt_token_ids)
        if not ids:
            raise RequestError("the prompt has no tokens: give at least one")
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < self.vocab_size:
                raise RequestError(f"prompt_token_ids has {i!r}: token ids are whole numbers from 0 to {self.vocab_size - 1}")
        if len(ids) >= self.limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, and max_model_len={self.limits.max_model_len} leaves no room to answer: shorten it"
            )
        if bad := [i for i in params.stop_token_ids if i >= self.vocab_size]:
            raise RequestError(f"stop_token_ids has {bad[0]}: token ids are whole numbers from 0 to {self.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this engine was made with skip_tokenizer_init: use stop_token_ids")
        return [int(i) for i in ids]


def _derive_seed(seed: int, number: int) -> int:
    """A seed for a request that brought none: its own, and the same in every run with the same engine seed and order."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big")


def get_tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise RequestError("this engine was made with skip_tokenizer_init: it has no tokenizer")
    return engine.tokenizer
