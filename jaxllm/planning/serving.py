"""Serving, planned: the steps that an engine would run, compiled for where it would run them, and what that says."""

import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig
from jaxllm.planning.abstract import abstract_engine, bytes_on_a_device
from jaxllm.planning.chips import Topology
from jaxllm.planning.closed_set import CompiledSet, compile_closed_set
from jaxllm.planning.hlo import Collective, Cost, Program, memory
from jaxllm.serving.batch import Bucket, make_buckets, pick_bucket, step_layout
from jaxllm.serving.defaults import default_batched_tokens, default_page_size
from jaxllm.serving.programs import LayerByLayer, WholeStep
from pallas_kernels.ragged_paged_attention import loop_trips


@dataclass(frozen=True)
class StepReport:
    """One step on one device: bytes between HBM and the chip, as compiled and the least there can be (weights, keys and values, each
    once); operations; `bound_s`, the least time that the chip's published bandwidth and peak allow for what is moved and computed;
    the tokens a second that this is at most; `compiler_s`, what the compiler expects (`Cost.compiler_s`), None where it does not say
    (GPUs); collectives; bytes of temporaries; seconds of compiling."""

    tokens: int
    bytes_moved: int
    bytes_minimum: int
    flops: float
    bound_s: float
    compiler_s: float | None
    tokens_per_s: float
    collectives: list[Collective]
    temporaries: int
    compile_s: float


@dataclass(frozen=True)
class ServingPlan:
    """What `jaxllm plan` tells; bytes are of one device. `max_sequences`: for how many of
    `max_model_len` tokens there is room, and `max_context` of how many tokens `max_num_seqs` could be, as far as the model goes; where
    the compiler refused a step for want of memory, so that its temporaries are not known, these are more than there are."""

    fits: bool
    per_chip_bytes: dict[str, int]
    decode: StepReport | None
    prefill: StepReport | None
    max_sequences: int
    compile_s: float
    remedy: str | None
    settings: dict[str, Any]
    max_context: int = 0


def plan_serving(
    config: ModelConfig,
    topology: Topology,
    *,
    tensor: int,
    max_num_seqs: int,
    max_model_len: int,
    max_num_batched_tokens: int | None = None,
    page_size: int | None = None,
    dtype=jnp.bfloat16,
    kv_cache_dtype: str = "auto",
) -> ServingPlan:
    """Compiles a decode step of `max_num_seqs` sequences of `max_model_len` tokens, and a step of `max_num_batched_tokens` tokens of
    prompts, with a page pool that holds them all; on the CPU every step, with the pool that the engine would make. None: what the
    engine would choose. Raises ConfigError for settings that cannot be."""
    chip = topology.chip
    page_size = page_size or default_page_size(chip.platform)
    batched = max_num_batched_tokens or default_batched_tokens(chip.platform, max_num_seqs)
    if tensor > len(topology.devices):
        raise ConfigError(f"tensor={tensor} needs as many devices, and {topology.name} has {len(topology.devices)}")
    if batched < max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens={batched} is less than a token for each of {max_num_seqs} sequences")
    start = time.perf_counter()
    max_pages = -(-max_model_len // page_size)
    sizes = dict(
        tensor=tensor, dtype=dtype, page_size=page_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    engine = abstract_engine(config, topology.devices, **sizes)
    pages, slots = engine.abstract_state
    parameters, kv_cache = bytes_on_a_device(engine.all_weights), bytes_on_a_device(pages)
    num_pages, slot_bytes = pages.shape[0] // config.num_layers, bytes_on_a_device(slots)
    a_page = kv_cache // num_pages
    length = max(1, min(max_model_len, (num_pages - 1) * page_size // max_num_seqs))  # of each, when all have the same

    closed_set = make_buckets(max_num_seqs, batched, one_row=False)
    buckets = {
        "decode": pick_bucket(closed_set, max_num_seqs, max_num_seqs, True),
        "prefill": max(bucket for bucket in closed_set if not bucket.decode),
    }
    host: dict[str, int] = {}
    if isinstance(engine, LayerByLayer):
        compiled = compile_closed_set(engine, closed_set, max_pages)
        host = {"runtime": compiled.runtime, "programs": compiled.held, "compiling": compiled.compiling}
        made, failed = _made_on_cpu(config, compiled, buckets, max_num_seqs, length, page_size), None
    else:
        made, failed = _made(engine, buckets, max_pages, chip.platform)

    reports: dict[str, StepReport | None] = dict.fromkeys(buckets)
    used = {"parameters": parameters, "kv_cache": kv_cache}
    used["temporaries"] = max((part.held["temporaries"] for part in made.values()), default=0)
    passing = (4 * step_layout(buckets[which], max_pages).size + made[which].held["results"] for which in buckets if which in made)
    used["other"] = slot_bytes + max(passing, default=0) + sum(part.held["code"] for part in made.values())
    used |= host
    for which, bucket in buckets.items():
        if which not in made or "head" not in made:
            continue
        cost, tokens = Cost(), max_num_seqs if which == "decode" else batched
        for part in (which, "head"):
            cost.add(made[part].cost)
        keys = max_num_seqs * _keys_seen(config, length) if which == "decode" else tokens
        matmuls = cost.product_flops if chip.platform == "cpu" else _matmul_flops(config, engine, bucket.tokens, bucket.sequences)
        flops = matmuls + cost.kernel_flops
        bound = max(cost.hbm_bytes / chip.bandwidth, flops / chip.flops)
        reports[which] = StepReport(
            tokens=tokens,
            bytes_moved=int(cost.hbm_bytes),
            bytes_minimum=_weights_read(config, engine, tokens) + int(a_page / page_size * keys),
            flops=flops,
            bound_s=bound,
            compiler_s=cost.compiler_s(chip),
            tokens_per_s=tokens / bound,
            collectives=cost.list_collectives(),
            temporaries=max(made[part].held["temporaries"] for part in (which, "head")),
            compile_s=made[which].seconds + made["head"].seconds,
        )
    capacity, total = chip.memory_bytes, sum(used.values())
    room = capacity - (total - kv_cache) - a_page  # for pages that sequences use
    most = max(0, (room + slot_bytes) // (max_pages * a_page + slot_bytes // max_num_seqs))
    longest = min(config.max_positions, max(0, room // a_page) // max_num_seqs * page_size)
    fits = failed is None and total <= capacity
    remedy = None if fits else _remedy(parameters, capacity, most, max_num_seqs, tensor, len(topology.devices), failed, chip.platform)
    settings = dict(
        sizes, topology=topology.name, chip=chip.name, bandwidth=chip.bandwidth, peak_flops=chip.flops, dtype=jnp.dtype(dtype).name,
        num_pages=num_pages, max_num_batched_tokens=batched, context=length,
    )  # fmt: skip
    used |= {"total": total, "capacity": capacity}
    seconds = time.perf_counter() - start
    return ServingPlan(fits, used, reports["decode"], reports["prefill"], most, seconds, remedy, settings, longest)


@dataclass(frozen=True)
class _Made:
    """Programs that run one after the other: bytes as `hlo.memory` has them, what a run of them costs, seconds of compiling."""

    held: dict[str, int]
    cost: Cost
    seconds: float


def _made(engine: WholeStep, buckets: dict[str, Bucket], max_pages: int, platform: str) -> tuple[dict[str, _Made], str | None]:
    """The two steps and what draws from them, and what the compiler said if it refused one for want of memory."""
    layers = lambda which: partial(engine.compile_layers, buckets[which], step_layout(buckets[which], max_pages))
    # What takes longest comes first.
    programs = {
        "prefill": layers("prefill"),
        "head": partial(engine.compile_head, buckets["decode"].sequences),
        "decode": layers("decode"),
    }

    def compile_(program: Callable[[], Any]) -> _Made | str:
        began = time.perf_counter()
        try:
            compiled = program()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return str(error)
        seconds = time.perf_counter() - began
        return _Made(memory(compiled), Program(compiled.as_text(), platform).cost(), seconds)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(programs, pool.map(compile_, programs.values()), strict=True))
    refused = next((said for said in done.values() if isinstance(said, str)), None)
    return {which: part for which, part in done.items() if isinstance(part, _Made)}, refused


def _made_on_cpu(
    config: ModelConfig, compiled: CompiledSet, buckets: dict[str, Bucket], sequences: int, length: int, page_size: int
) -> dict[str, _Made]:
    """The same of an engine that calls a program for each layer; the seconds are of the step with what draws from it."""
    kinds, made = Counter(config.layers), {}
    for which, bucket in buckets.items():
        first, layers, rows, head = compiled.programs[bucket]
        tokens = sequences if which == "decode" else bucket.tokens
        trips = lambda kind, tokens=tokens, decode=bucket.decode: loop_trips(tokens, length, page_size, decode=decode, window=kind.window)
        parts = [(first, 1, None), *((layers[kind], count, trips(kind)) for kind, count in kinds.items()), (rows, 1, None)]
        made[which] = _together(parts, compiled.seconds[bucket])
    made["head"] = _together([(head, 1, None)], 0.0)
    return made


def _together(parts: list[tuple[Any, int, dict[str, float] | None]], seconds: float) -> _Made:
    held: dict[str, int] = {}
    cost = Cost()
    for program, times, trips in parts:
        for name, size in memory(program).items():
            held[name] = max(held.get(name, 0), size) if name == "temporaries" else held.get(name, 0) + size
        cost.add(Program(program.as_text(), "cpu", trips).cost(), times)
    return _Made(held, cost, seconds)


def _keys_seen(config: ModelConfig, length: int) -> float:
    """Of a sequence, by its next token, in the mean of the layers: those that slide see a window."""
    return sum(min(layer.window or length, length) for layer in config.layers) / config.num_layers


def _matmul_flops(config: ModelConfig, engine: Any, tokens: int, sequences: int) -> float:
    """Of the products with weights on a device: two for each weight and token; the head's for each sequence only."""
    count = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    ends = [x for x in engine.all_weights if config.vocab_size in x.shape]
    matrices = [x for x in engine.all_weights if x.ndim >= 2 and config.vocab_size not in x.shape]
    return 2.0 * tokens * sum(map(count, matrices)) + 2.0 * sequences * max(map(count, ends))


def _weights_read(config: ModelConfig, engine: Any, tokens: int) -> int:
    """Bytes of parameters that a step cannot but read: all, but of the embeddings only the rows of its tokens unless they are the
    head's too."""
    total = bytes_on_a_device(engine.all_weights)
    if config.tie_embeddings:
        return total
    table = next(x for x in engine.all_weights if x.shape == (config.vocab_size, config.embedding_dim))
    return total - max(0, bytes_on_a_device(table) - tokens * table.shape[1] * jnp.dtype(table.dtype).itemsize)


def _remedy(parameters: int, capacity: int, most: int, asked: int, tensor: int, devices: int, failed: str | None, platform: str) -> str:
    if platform == "cpu":
        fewer = f"lower max_num_seqs to {most}, or max_model_len" if 0 < most < asked else "lower max_num_seqs or max_model_len"
        return "the parameters alone exceed the memory: a smaller dtype (bfloat16), or a smaller model" if parameters > capacity else fewer
    if parameters > capacity:
        times = -(-parameters * tensor // capacity)
        more = f"tensor={1 << (times - 1).bit_length()}" + ("" if times <= devices else " on a topology with as many chips")
        return f"the parameters alone exceed a chip's memory: split them over more chips ({more}), or choose a smaller dtype"
    if 0 < most < asked:
        return f"lower max_num_seqs to {most}, or max_model_len, or split over more chips than {tensor}"
    said = f" (the compiler: {failed[:300]})" if failed else ""
    return f"split over more chips than {tensor}, or lower max_num_batched_tokens, max_num_seqs or max_model_len{said}"
