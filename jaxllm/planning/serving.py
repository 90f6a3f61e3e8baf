"""Serving, planned: the steps that an engine would run, compiled for where it would run them, and what that says."""

import math
import time
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
from jaxllm.planning.hlo import Collective, Cost, Program, memory
from jaxllm.serving.batch import Bucket, step_layout


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
    """What `jaxllm plan` tells; bytes are of one device. `max_sequences`: for how many there is room; where the compiler refused a
    step for want of memory, so that its temporaries are not known, it is more than there are."""

    fits: bool
    per_chip_bytes: dict[str, int]
    decode: StepReport | None
    prefill: StepReport | None
    max_sequences: int
    compile_s: float
    remedy: str | None
    settings: dict[str, Any]


def plan_serving(
    config: ModelConfig,
    topology: Topology,
    *,
    tensor: int,
    max_num_seqs: int,
    max_model_len: int,
    max_num_batched_tokens: int = 2048,
    page_size: int = 64,
    dtype=jnp.bfloat16,
    kv_cache_dtype: str = "auto",
) -> ServingPlan:
    """Compiles a decode step of `max_num_seqs` sequences of `max_model_len` tokens, and a step of `max_num_batched_tokens` tokens
    of prompts, with a page pool that holds them all. Raises ConfigError for settings that cannot be."""
    if tensor > len(topology.devices):
        raise ConfigError(f"tensor={tensor} needs as many devices, and {topology.name} has {len(topology.devices)}")
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens={max_num_batched_tokens} is less than a token for each of {max_num_seqs} sequences")
    start = time.perf_counter()
    max_pages = -(-max_model_len // page_size)
    sizes = dict(
        tensor=tensor, dtype=dtype, num_pages=max_num_seqs * max_pages + 1, page_size=page_size, max_num_seqs=max_num_seqs,
        max_model_len=max_model_len, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    engine = abstract_engine(config, topology.devices, **sizes)
    pages, slots = engine.abstract_state
    parameters, kv_cache = bytes_on_a_device(engine.weights), bytes_on_a_device(pages)
    buckets = {
        "decode": Bucket(max_num_seqs, max_num_seqs, True),
        "prefill": Bucket(max_num_batched_tokens, max_num_seqs),
    }
    layouts = {which: step_layout(bucket, max_pages) for which, bucket in buckets.items()}

    layers = lambda which: partial(engine.compile_layers, buckets[which], layouts[which])
    # What takes longest comes first.
    programs = {"prefill": layers("prefill"), "head": partial(engine.compile_head, max_num_seqs), "decode": layers("decode")}

    def compile_(program: Callable[[], Any]) -> tuple[Any, float] | str:
        began = time.perf_counter()
        try:
            return program(), time.perf_counter() - began
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(programs, pool.map(compile_, programs.values()), strict=True))

    capacity = topology.chip.memory_bytes
    kv_token = kv_cache // ((max_num_seqs * max_pages + 1) * page_size)
    reports: dict[str, StepReport | None] = dict.fromkeys(buckets)
    made = {}
    for which, result in done.items():
        if not isinstance(result, str):
            compiled, seconds = result
            made[which] = memory(compiled), Program(compiled.as_text(), topology.chip.platform).cost(), seconds
    used = {"temporaries": max((held["temporaries"] for held, *_ in made.values()), default=0)}
    passing = (4 * layouts[which].size + made[which][0]["results"] for which in buckets if which in made)
    used["other"] = bytes_on_a_device(slots) + max(passing, default=0) + sum(held["code"] for held, *_ in made.values())
    for which, bucket in buckets.items():
        if which not in made or "head" not in made:
            continue
        cost, tokens = Cost(), bucket.tokens
        for part in (which, "head"):
            cost.add(made[part][1])
        keys = max_num_seqs * _keys_seen(config, max_model_len) if which == "decode" else tokens
        flops = _matmul_flops(config, engine, tokens, bucket.sequences) + cost.kernel_flops
        bound = max(cost.hbm_bytes / topology.chip.bandwidth, flops / topology.chip.flops)
        reports[which] = StepReport(
            tokens=tokens,
            bytes_moved=int(cost.hbm_bytes),
            bytes_minimum=_weights_read(config, engine, tokens) + int(kv_token * keys),
            flops=flops,
            bound_s=bound,
            compiler_s=cost.compiler_s(topology.chip),
            tokens_per_s=tokens / bound,
            collectives=cost.list_collectives(),
            temporaries=max(made[part][0]["temporaries"] for part in (which, "head")),
            compile_s=made[which][2] + made["head"][2],
        )
    total = parameters + kv_cache + used["temporaries"] + used["other"]
    per_sequence = max(1, (kv_cache + bytes_on_a_device(slots)) // max_num_seqs)
    room = capacity - parameters - used["temporaries"] - (used["other"] - bytes_on_a_device(slots))
    failed = next((result for result in done.values() if isinstance(result, str)), None)
    most = max(0, room // per_sequence)
    fits = failed is None and total <= capacity
    remedy = None if fits else _remedy(parameters, capacity, most, max_num_seqs, tensor, len(topology.devices), failed)
    used |= {"parameters": parameters, "kv_cache": kv_cache, "total": total, "capacity": capacity}
    settings = dict(
        sizes, topology=topology.name, chip=topology.chip.name, dtype=jnp.dtype(dtype).name, max_num_batched_tokens=max_num_batched_tokens
    )
    return ServingPlan(fits, used, reports["decode"], reports["prefill"], most, time.perf_counter() - start, remedy, settings)


def _keys_seen(config: ModelConfig, length: int) -> float:
    """Of a sequence, by its next token, in the mean of the layers: those that slide see a window."""
    return sum(min(layer.window or length, length) for layer in config.layers) / config.num_layers


def _matmul_flops(config: ModelConfig, engine: Any, tokens: int, sequences: int) -> float:
    """Of the products with weights on a device: two for each weight and token; the head's for each sequence only."""
    count = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    ends = [x for x in jax.tree.leaves(engine.weights) if config.vocab_size in x.shape]
    matrices = [x for x in jax.tree.leaves(engine.weights) if x.ndim >= 2 and config.vocab_size not in x.shape]
    return 2.0 * tokens * sum(map(count, matrices)) + 2.0 * sequences * max(map(count, ends))


def _weights_read(config: ModelConfig, engine: Any, tokens: int) -> int:
    """Bytes of parameters that a step cannot but read: all, but of the embeddings only the rows of its tokens unless they are the
    head's too."""
    total = bytes_on_a_device(engine.weights)
    if config.tie_embeddings:
        return total
    table = next(x for x in jax.tree.leaves(engine.weights) if x.shape == (config.vocab_size, config.embedding_dim))
    return total - max(0, bytes_on_a_device(table) - tokens * table.shape[1] * jnp.dtype(table.dtype).itemsize)


def _remedy(parameters: int, capacity: int, most: int, asked: int, tensor: int, devices: int, failed: str | None) -> str:
    if parameters > capacity:
        times = -(-parameters * tensor // capacity)
        more = f"tensor={1 << (times - 1).bit_length()}" + ("" if times <= devices else " on a topology with as many chips")
        return f"the parameters alone exceed a chip's memory: split them over more chips ({more}), or choose a smaller dtype"
    if 0 < most < asked:
        return f"lower max_num_seqs to {most}, or max_model_len, or split over more chips than {tensor}"
    said = f" (the compiler: {failed[:300]})" if failed else ""
    return f"split over more chips than {tensor}, or lower max_num_batched_tokens, max_num_seqs or max_model_len{said}"
