"""Runs plans on the device: one compiled program for each shape a step can have."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoints.load import Model
from jaxllm.serving.batch import Bucket, make_buckets, pick_bucket, step_layout
from jaxllm.serving.kv_cache import make_kv_pages
from jaxllm.serving.programs import DeviceState, LayerByLayer, WholeStep
from jaxllm.serving.request import Request
from jaxllm.serving.scheduler import ScheduledSequence, SchedulerConfig, StepPlan
from jaxllm.sharding import ShardingRules


@dataclass
class RunnerStats:
    """What was compiled, and how long it took."""

    compiles: int = 0
    compiles_after_warmup: int = 0
    compile_s: float = 0.0


class Runner:
    """Holds the weights and the KV cache. `launch` starts a step; the tokens it returns are read later."""

    def __init__(self, model: Model, limits: SchedulerConfig, *, num_pages: int, dtype, mesh: Mesh, rules: ShardingRules):
        self.model, self.limits, self.mesh, self.rules, self.num_pages = model, limits, mesh, rules, num_pages
        self.max_pages = -(-limits.max_model_len // limits.page_size)
        self.buckets = make_buckets(limits.max_num_seqs, limits.max_num_batched_tokens)
        self.stats = RunnerStats()
        self._layouts = {b: step_layout(b, self.max_pages) for b in self.buckets}
        self._whole = NamedSharding(mesh, PartitionSpec())
        self.state = DeviceState(
            kv_pages=make_kv_pages(model.config, rules, mesh, num_pages, limits.page_size, dtype),
            last_tokens=jax.device_put(np.zeros(limits.max_num_seqs, np.int32), self._whole),
        )
        way = WholeStep if model.scanned else LayerByLayer
        self.programs = way(model, self.state, num_pages=num_pages, mesh=mesh, rules=rules)
        self._programs: dict[Bucket, Any] = {}
        self._warm = False

    def warm_up(self, progress=None) -> None:
        """Compiles every program there is. A compile after this is counted in `compiles_after_warmup`."""
        todo = [b for b in self.buckets if b not in self._programs]
        start = time.perf_counter()
        with ThreadPoolExecutor(max(1, len(todo))) as pool:  # tracing takes turns, compiling runs side by side
            for bucket, program in zip(todo, pool.map(self._compile, todo), strict=True):
                self._programs[bucket] = program
                if progress is not None:
                    progress(bucket)
        self.stats.compile_s += time.perf_counter() - start
        self._warm = True

    def prepare(self, plan: StepPlan, requests: dict[str, Request]) -> tuple[Bucket, np.ndarray]:
        """The host's part of a step: its shape, and its arrays in one buffer."""
        bucket = pick_bucket(self.buckets, plan.num_tokens, len(plan.scheduled), plan.num_decode == len(plan.scheduled))
        return bucket, self._pack(plan, bucket, requests)

    def launch(self, bucket: Bucket, buffer: np.ndarray) -> jax.Array:
        """Starts a step. Returns int32 [sequences]: the token drawn after each scheduled sequence, in order, maybe not yet computed."""
        return self.programs.run(self._program(bucket), self.state, jax.device_put(buffer, self._whole))

    def _program(self, bucket: Bucket) -> Any:
        if bucket not in self._programs:
            start = time.perf_counter()
            self._programs[bucket] = self._compile(bucket)
            self.stats.compile_s += time.perf_counter() - start
            self.stats.compiles_after_warmup += self._warm
        return self._programs[bucket]

    def _compile(self, bucket: Bucket) -> Any:
        self.stats.compiles += 1
        return self.programs.compile(self._layouts[bucket], bucket.decode)

    def _pack(self, plan: StepPlan, bucket: Bucket, requests: dict[str, Request]) -> np.ndarray:
        """The step's arrays in one buffer."""
        buffer, batch = self._layouts[bucket].new()
        batch["slots"][:] = self.limits.max_num_seqs
        row = 0
        for n, s in enumerate(plan.scheduled):
            request = requests[s.sequence.request_id]
            rows = slice(row, row + s.count)
            batch["tokens"][rows] = _token_ids(request, s)
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
                p = request.params
                batch["temperature"][n], batch["top_p"][n], batch["min_p"][n] = p.temperature, p.top_p, p.min_p
                batch["top_k"][n] = min(max(p.top_k, 0), self.model.config.vocab_size)
                batch["seed"][n] = divmod(request.seed, 2**32)
                batch["position"][n] = s.start + s.count
        batch["counts"][:] = plan.num_decode, len(plan.scheduled)
        return buffer

    def _rope_lengths(self, s: ScheduledSequence, positions: np.ndarray) -> np.ndarray | int:
        """The sequence length that each token's rotary angles are for (`rope.rope_table`); LongRoPE goes by the whole sequence."""
        if self.limits.recompute_beyond is not None:
            return s.num_tokens
        return np.maximum(s.sequence.num_prompt, positions + 1)


def _token_ids(request: Request, s: ScheduledSequence) -> list[int]:
    """The tokens that a scheduled sequence feeds in; -1 for the one that has not been read back."""
    prompt, outputs = request.prompt_token_ids, request.output_token_ids
    first, last = s.start, s.start + s.count
    known = prompt[first:last] + outputs[max(0, first - len(prompt)) : max(0, last - len(prompt))]
    return known + [-1] * (s.count - len(known))
