"""Runs plans on the device: one compiled program for each shape a step can have."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoints.load import Model
from jaxllm.errors import ConfigError
from jaxllm.serving.batch import Bucket, make_buckets, pick_bucket, step_layout
from jaxllm.serving.block_sizes import find_table
from jaxllm.serving.copy_pages import CopyPages
from jaxllm.serving.executables import ExecutableCache
from jaxllm.serving.host_pages import HostPages
from jaxllm.serving.kv_cache import make_kv_pages
from jaxllm.serving.logits import LogitsProcessor, check_processors
from jaxllm.serving.logprobs import TokenLogprobs
from jaxllm.serving.pooling import PROMPT_BLOCK, PoolRows, pool_rows
from jaxllm.serving.programs import DeviceState, LayerByLayer, WholeStep
from jaxllm.serving.request import Completion
from jaxllm.serving.scheduler import ScheduledSequence, SchedulerConfig, StepPlan
from jaxllm.serving.slot_state import MaskWriter, SlotWriter, features, make_slots, needs_slot
from jaxllm.serving.warm_up import WarmUp
from jaxllm.sharding import ShardingRules

logger = logging.getLogger(__name__)

# Programs beside those of the buckets, by what they do. Those that cut blocks out of hidden states go by the number of tokens.
# Those that write masks have their size with them, and those that move pages to host memory and back.
_COPY, _WRITE_SLOT, _PROMPT_LOGPROBS, _WRITE_MASKS, _POOL = "copy pages", "write a slot", "prompt logprobs", "write masks", "pool"
_SAVE, _FETCH = "save", "fetch"
_Key = Bucket | str | int | tuple[str, int]


@dataclass
class RunnerStats:
    """What was compiled, and how long it took."""

    compiles: int = 0
    compiles_after_warmup: int = 0
    compile_s: float = 0.0


class PromptRows(NamedTuple):
    """A block of a step's rows whose log-probabilities are asked for: tokens `start` to `start + len(tokens)` of a prompt."""

    sequence: int
    start: int
    first_row: int
    tokens: list[int]


@dataclass
class Prepared:
    """The host's part of a step: its shape, its arrays in one buffer, and what is done before and after it."""

    bucket: Bucket
    buffer: np.ndarray
    copies: np.ndarray | None  # of pages
    saves: tuple[tuple[int, int], ...]  # to host memory
    fetches: tuple[tuple[int, int], ...]  # from there
    slots: list[np.ndarray]  # to write
    logprobs: bool  # whether any sequence asks for them
    prompt_rows: list[PromptRows]
    pool_rows: list[PoolRows]


class Launched(NamedTuple):
    """What a step has drawn, maybe not yet computed: `tokens` [N], in the order of the plan, and what else was asked for."""

    tokens: jax.Array
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[tuple[PromptRows, TokenLogprobs]]
    pooled: list[tuple[PoolRows, jax.Array]]  # and their sum [D]


class Runner:
    """Holds the weights and the KV cache. `launch` starts a step; what it returns is read later."""

    def __init__(
        self,
        model: Model,
        limits: SchedulerConfig,
        *,
        num_pages: int,
        dtype,
        mesh: Mesh,
        rules: ShardingRules,
        kv_dtype=None,
        attention_backend: str = "auto",
        one_row: bool = False,
        max_logprobs: int = 20,
        processors: Mapping[str, LogitsProcessor] | None = None,
        cache_dir: Path | None = None,
        bundle: str | None = None,
        host_pages: int = 0,
    ):
        self.model, self.limits, self.mesh, self.rules, self.num_pages = model, limits, mesh, rules, num_pages
        self.max_pages = -(-limits.max_model_len // limits.page_size)
        self.buckets = make_buckets(limits.max_num_seqs, limits.max_num_batched_tokens, one_row=one_row)
        self.processors = dict(processors or {})
        check_processors(self.processors, model.config.vocab_size, limits.max_model_len)
        self._processor_numbers = {name: i for i, name in enumerate(self.processors, 1)} | {None: 0}
        self.stats, self.dtype = RunnerStats(), np.dtype(dtype)
        self._layouts = {b: step_layout(b, self.max_pages) for b in self.buckets}
        self._whole = NamedSharding(mesh, PartitionSpec())
        self.state = DeviceState(
            kv_pages=make_kv_pages(model.config, rules, mesh, num_pages, limits.page_size, kv_dtype or dtype),
            slots=make_slots(limits.max_num_seqs, limits.max_model_len, model.config.vocab_size, mesh),
        )
        way = WholeStep if model.scanned else LayerByLayer
        shapes = replace(limits, policy="fcfs", policy_options={})  # programs do not depend on who runs first
        made_from = (model.config, shapes, num_pages, dtype, rules, one_row, max_logprobs, model.scanned, kv_dtype, attention_backend)
        # What a caller's own functions do is not to be known by name.
        if bundle is not None and self.processors:
            raise ConfigError(f"the bundle {bundle} has no programs with logits_processors in them: leave out one or the other")
        kept = (cache_dir is not None or bundle is not None) and not self.processors
        tuned = find_table(mesh.devices.flat[0].device_kind)
        self.cache = ExecutableCache(cache_dir, mesh, made_from, tuned=tuned, bundle=bundle) if kept else None
        self.programs = way(
            model,
            self.state,
            num_pages=num_pages,
            mesh=mesh,
            rules=rules,
            dtype=dtype,
            attention_backend=attention_backend,
            tuned=tuned,
            max_logprobs=max_logprobs,
            processors=tuple(self.processors.values()),
            cache=self.cache,
        )
        self._slots = SlotWriter(self.state.slots, model.config.vocab_size, mesh)
        self._masks = MaskWriter(self.state.slots, mesh)
        self._copies = CopyPages(self.state.kv_pages, num_pages=num_pages, most=limits.max_num_seqs, mesh=mesh)
        self.host_pages = HostPages(self.state.kv_pages, num_pages=num_pages, host_pages=host_pages, mesh=mesh) if host_pages else None
        self._programs: dict[_Key, Any] = {}  # those that `_warm_up` has not made
        self._warm_up: WarmUp | None = None
        self._warm = False

    def warm_up(self, progress: Callable[[int, int], None] | None = None, *, background: bool = False) -> None:
        """Compiles every program there is, telling `progress(done, of)`; a compile of any other after this is counted in
        `compiles_after_warmup`.

        `background`: returns when there are those that any step can run with, in a larger shape than its own if need be; the
        rest are compiled meanwhile (`finish_warm_up` waits for them).
        """
        decode, mixed = ([b for b in self.buckets if b.decode == kind] for kind in (True, False))
        enough = [mixed[-1], decode[-1]]
        small = [_WRITE_SLOT, _COPY, _PROMPT_LOGPROBS, _POOL, *sorted({bucket.tokens for bucket in self.buckets})]
        small += [(_WRITE_MASKS, size) for size in self._masks.sizes]
        if self.host_pages is not None:
            small += [(kind, size) for size in self.host_pages.sizes for kind in (_SAVE, _FETCH)]
        # Where all are waited for, those that take longest come first; behind a server's back, those that are missed most.
        rest = self.buckets if background else self.buckets[::-1]
        every = list(dict.fromkeys([*enough, *([decode[0], *small, *rest] if background else [*rest, *small])]))
        start = time.perf_counter()
        # Tracing takes turns, compiling runs side by side; each takes memory, so no more of them than there are processors.
        self._warm_up = WarmUp(every, self._compile, os.cpu_count() or 2)
        self._warm_up.wait(enough if background else None, progress)
        self.stats.compile_s += time.perf_counter() - start
        self._warm = True

    def finish_warm_up(self) -> None:
        """Waits for the programs that a warm-up in the background is still compiling."""
        if self._warm_up is not None:
            self._warm_up.wait()

    def profile(self) -> tuple[float, float]:
        """Seconds of the shortest step, and of each token of a prompt in the longest, measured on steps of padding alone (which attend to
        nothing). Not while programs are being compiled."""
        shortest = self._seconds(min((b for b in self.buckets if b.decode), key=lambda b: b.tokens))
        longest = max((b for b in self.buckets if not b.decode), key=lambda b: b.tokens)
        return shortest, self._seconds(longest) / longest.tokens

    def _seconds(self, bucket: Bucket) -> float:
        """Of a step of padding; the first does not count."""
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            buffer = jax.device_put(self._pack(StepPlan((), 0, 0), bucket, []), self._whole)
            drawn, _ = self.programs.run(self._program(bucket), self.state, buffer)
            jax.block_until_ready(drawn.tokens)
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    def close(self) -> None:
        """Ends a warm-up that still goes on."""
        if self._warm_up is not None:
            self._warm_up.close()

    def prepare(self, plan: StepPlan, completions: dict[int, Completion]) -> Prepared:
        bucket = pick_bucket(self._ready_buckets(), plan.num_tokens, len(plan.scheduled), plan.num_decode == len(plan.scheduled))
        chosen = [completions[s.sequence.id] for s in plan.scheduled]
        return Prepared(
            bucket,
            self._pack(plan, bucket, chosen),
            self._copies.pack(plan.copies) if plan.copies else None,
            plan.saves,
            plan.fetches,
            [self._slots.pack(c, s.sequence.slot) for s, c in zip(plan.scheduled, chosen, strict=True) if s.admitted and needs_slot(c)],
            any(s.samples and c.request.params.logprobs is not None for s, c in zip(plan.scheduled, chosen, strict=True)),
            _prompt_rows(plan, chosen),
            pool_rows(plan, chosen),
        )

    def launch(self, step: Prepared, masks: Callable[[], tuple[list[int], np.ndarray]] | None = None) -> Launched:
        """Starts a step. `masks` is called when that is under way which does not depend on it, and returns slots, and for each
        the tokens that may be drawn there (uint32 [slots, V/32])."""
        state = self.state
        if self.host_pages is not None:
            program = lambda kind, size: self._program((kind, size))
            state.kv_pages = self.host_pages.move(program, state.kv_pages, step.saves, step.fetches)
        if step.copies is not None:
            state.kv_pages = self._copies.run(self._program(_COPY), state.kv_pages, step.copies)
        for buffer in step.slots:
            state.slots = self._slots.run(self._program(_WRITE_SLOT), state.slots, buffer)

        def before_draw() -> None:
            slots, allowed = masks()
            if slots:
                rows = self._masks.pack(slots, allowed)
                state.slots = self._masks.run(self._program((_WRITE_MASKS, len(rows))), state.slots, rows)

        buffer = jax.device_put(step.buffer, self._whole)
        drawn, hidden = self.programs.run(self._program(step.bucket), state, buffer, before_draw if masks is not None else None)
        prompts = []
        for rows in step.prompt_rows:
            block = self._block(step.bucket, hidden, rows.first_row)
            tokens = jax.device_put(np.asarray(rows.tokens + [0] * (PROMPT_BLOCK - len(rows.tokens)), np.int32), self._whole)
            prompts.append((rows, self.programs.prompt_logprobs(self._program(_PROMPT_LOGPROBS), block, tokens)))
        pooled = []
        for rows in step.pool_rows:
            block, weights = self._block(step.bucket, hidden, rows.first_row), jax.device_put(rows.weights(), self._whole)
            pooled.append((rows, self.programs.pool(self._program(_POOL), block, weights)))
        return Launched(drawn.tokens, drawn.logprobs if step.logprobs else None, prompts, pooled)

    def _block(self, bucket: Bucket, hidden: jax.Array, first_row: int) -> jax.Array:
        """PROMPT_BLOCK rows of a step's hidden states."""
        return self._program(bucket.tokens)(hidden, jax.device_put(np.int32(first_row), self._whole))

    def _ready_buckets(self) -> list[Bucket]:
        """Those whose programs are there; all of them where none was compiled ahead."""
        return [b for b in self.buckets if self._warm_up.ready(b)] if self._warm else self.buckets

    def _program(self, key: _Key) -> Any:
        if self._warm_up is not None and (program := self._warm_up.get(key)) is not None:
            return program
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self._compile(key)
            self.stats.compile_s += time.perf_counter() - start
            if self._warm:
                self.stats.compiles_after_warmup += 1
                logger.warning("compiled %s after warm-up: this is a bug in jaxllm, please report it", key)
        return self._programs[key]

    def _compile(self, key: _Key) -> Any:
        self.stats.compiles += 1
        if key == _COPY:
            return self._copies.compile()
        if key == _WRITE_SLOT:
            return self._slots.compile()
        if key == _PROMPT_LOGPROBS:
            return self.programs.compile_prompt_logprobs()
        if key == _POOL:
            return self.programs.compile_pool()
        if isinstance(key, tuple):
            return self._masks.compile(key[1]) if key[0] == _WRITE_MASKS else self.host_pages.compile(*key)
        if isinstance(key, int):
            return self.programs.compile_block(key)
        return self.programs.compile(key, self._layouts[key])

    def _pack(self, plan: StepPlan, bucket: Bucket, completions: list[Completion]) -> np.ndarray:
        """The step's arrays in one buffer."""
        buffer, batch = self._layouts[bucket].new()
        batch["slots"][:] = self.limits.max_num_seqs
        row = 0
        for n, s in enumerate(plan.scheduled):
            completion = completions[n]
            rows = slice(row, row + s.count)
            batch["tokens"][rows] = _token_ids(completion, s)
            positions = np.arange(s.start, s.start + s.count, dtype=np.int32)
            batch["positions"][rows] = positions
            batch["rope_lengths"][rows] = self._rope_lengths(s, positions)
            batch["token_slots"][rows] = s.sequence.slot
            batch["page_table"][n, : len(s.pages)] = s.pages
            batch["kv_lens"][n] = s.start + s.count
            row += s.count
            batch["query_starts"][n + 1 :] = row
            if s.samples:
                batch["slots"][n] = s.sequence.slot
                p = completion.request.params
                batch["temperature"][n], batch["top_p"][n] = p.temperature, p.top_p
                batch["min_p"][n], batch["typical_p"][n] = p.min_p, p.typical_p
                batch["top_k"][n] = min(max(p.top_k, 0), self.model.config.vocab_size)
                batch["seed"][n] = divmod(completion.seed, 2**32)
                batch["position"][n], batch["num_prompt"][n] = s.start + s.count, len(completion.request.prompt_token_ids)
                batch["features"][n], batch["processor"][n] = features(completion), self._processor_numbers[p.logits_processor]
                batch["presence"][n], batch["frequency"][n] = p.presence_penalty, p.frequency_penalty
                batch["repetition"][n] = p.repetition_penalty
        batch["counts"][:] = plan.num_decode, len(plan.scheduled)
        return buffer

    def _rope_lengths(self, s: ScheduledSequence, positions: np.ndarray) -> np.ndarray | int:
        """The sequence length that each token's rotary angles are for (`rope.rope_table`); LongRoPE goes by the whole sequence."""
        if self.limits.recompute_beyond is not None:
            return s.num_tokens
        return np.maximum(s.sequence.num_prompt, positions + 1)


def _token_ids(completion: Completion, s: ScheduledSequence) -> list[int]:
    """The tokens that a scheduled sequence feeds in; -1 for the one that has not been read back."""
    prompt, outputs = completion.request.prompt_token_ids, completion.output_token_ids
    first, last = s.start, s.start + s.count
    known = prompt[first:last] + outputs[max(0, first - len(prompt)) : max(0, last - len(prompt))]
    return known + [-1] * (s.count - len(known))


def _prompt_rows(plan: StepPlan, completions: list[Completion]) -> list[PromptRows]:
    """The rows of a step whose next token is one of a prompt with prompt_logprobs, in blocks."""
    blocks, row = [], 0
    for s, completion in zip(plan.scheduled, completions, strict=True):
        prompt = completion.request.prompt_token_ids
        if completion.request.params.prompt_logprobs is not None and completion.index == 0:
            for start in range(s.start, min(s.start + s.count, len(prompt) - 1), PROMPT_BLOCK):
                tokens = prompt[start + 1 : min(start + PROMPT_BLOCK, s.start + s.count) + 1]
                blocks.append(PromptRows(s.sequence.id, start + 1, row + start - s.start, tokens))
        row += s.count
    return blocks
