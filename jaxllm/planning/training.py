"""Fine-tuning, planned: the step that the trainer would run, compiled for where it would run it, and what that says."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.models import Decoder, ModelConfig
from jaxllm.planning.abstract import bytes_on_a_device
from jaxllm.planning.chips import Topology
from jaxllm.planning.hlo import Collective, Program, memory
from jaxllm.sharding import ShardingRules, fit_to_model, make_mesh
from jaxllm.training.config import TrainConfig
from jaxllm.training.metrics import training_flops
from jaxllm.training.model import prepared, stored_dtype
from jaxllm.training.parts import Params
from jaxllm.training.program import make_program
from jaxllm.training.step import abstract_state


@dataclass(frozen=True)
class TrainStepReport:
    """An optimiser step on one device. `flops`: operations as compiled, what is computed anew included; `flops_minimum`: those that
    the model needs (`training_flops`); `bound_s`: the least time for the bytes and operations as compiled; `mfu_bound`: the part of
    the chip's peak that `flops_minimum` would be at that time; `compiler_s`: what the compiler expects, or None."""

    tokens: int
    bytes_moved: int
    flops: float
    flops_minimum: float
    bound_s: float
    compiler_s: float | None
    tokens_per_s: float
    mfu_bound: float
    collectives: list[Collective]


@dataclass(frozen=True)
class TrainingPlan:
    """What `jaxllm plan --train` tells; bytes are of one device. `step` is None where the compiler refused for want of memory."""

    fits: bool
    per_chip_bytes: dict[str, int]
    step: TrainStepReport | None
    compile_s: float
    remedy: str | None
    settings: dict[str, Any]


def plan_training(config: TrainConfig, model: ModelConfig, topology: Topology) -> TrainingPlan:
    """Compiles the optimiser step of a run. Where `config.mesh` is one device, parameters are cut over all (fsdp). Raises ConfigError
    for settings that cannot be."""
    start, devices = time.perf_counter(), topology.devices
    sizes = config.mesh
    if sizes.data * sizes.fsdp * sizes.tensor == 1:
        config = replace(config, mesh=replace(sizes, fsdp=len(devices)))  # its own checks, of batch_size say, are made again
        sizes = config.mesh
    if (used := sizes.data * sizes.fsdp * sizes.tensor) > len(devices):
        raise ConfigError(f"the mesh of {used} devices is more than {topology.name} has")
    if config.max_length > model.max_positions:
        raise ConfigError(f"max_length={config.max_length} exceeds the model's {model.max_positions} positions")
    mesh = make_mesh(list(devices), data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
    rules = fit_to_model(ShardingRules(), model, mesh)
    decoder = nnx.eval_shape(lambda: prepared(_decoder(model, config), config), graph=False)
    program, trainable, frozen = make_program(config, decoder, mesh, rules, total_steps=1000)

    def placed(params: Params) -> Params:
        at = program.parts.shardings(params, mesh, rules)
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at[name]) for name, x in params.items()}

    trainable, frozen = placed(trainable), placed(frozen)
    state = abstract_state(trainable, program.optimizer, program.settings)
    batch = _batch(config, lambda *axes: NamedSharding(mesh, PartitionSpec(None, rules.batch, *axes)))
    bytes_ = {
        "parameters": bytes_on_a_device((trainable, frozen)),
        "optimizer": bytes_on_a_device((state.opt_state, state.ema)),
    }
    settings = {
        "topology": topology.name,
        "chip": topology.chip.name,
        "mesh": {"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor},
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "precision": config.precision,
        "remat": config.remat,
        "adapter": None if config.adapter is None else config.adapter.peft_type.lower(),
        "quantize_base": config.quantize_base,
        "trainable_parameters": sum(math.prod(x.shape) for x in trainable.values()),
    }
    capacity = topology.chip.memory_bytes
    try:
        compiled = program.train_step(state).lower(state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total = sum(bytes_.values())
        bytes_ |= {"temporaries": 0, "other": 0, "total": total, "capacity": capacity}
        remedy = _remedy(config, total > capacity, str(error))
        return TrainingPlan(False, bytes_, None, time.perf_counter() - start, remedy, settings)
    held, seconds = memory(compiled), time.perf_counter() - start
    cost = Program(compiled.as_text(), topology.chip.platform).cost()
    bytes_["temporaries"] = held["temporaries"]
    bytes_["other"] = held["arguments"] - sum(bytes_[name] for name in ("parameters", "optimizer")) + held["results"] + held["code"]
    total = sum(bytes_.values())
    bytes_ |= {"total": total, "capacity": capacity}
    tokens = config.batch_size * config.max_length * (2 if config.objective.data == "pairs" else 1)
    least = training_flops(model, tokens * config.max_length, tokens, frozen=config.adapter is not None) / used
    flops = cost.kernel_flops + cost.product_flops
    bound = max(cost.hbm_bytes / topology.chip.bandwidth, flops / topology.chip.flops)
    step = TrainStepReport(
        tokens=tokens,
        bytes_moved=int(cost.hbm_bytes),
        flops=flops,
        flops_minimum=least,
        bound_s=bound,
        compiler_s=cost.compiler_s(topology.chip),
        tokens_per_s=tokens / bound,
        mfu_bound=least / topology.chip.flops / bound,
        collectives=cost.list_collectives(),
    )
    fits = total <= capacity
    return TrainingPlan(fits, bytes_, step, seconds, None if fits else _remedy(config, False, ""), settings)


def _decoder(model: ModelConfig, config: TrainConfig) -> nnx.Module:
    return Decoder(model, scan_layers=True, dtype=stored_dtype(config), rngs=nnx.Rngs(0))


def _batch(config: TrainConfig, sharding: Any) -> dict[str, Any]:
    """The shapes of a step's batch, [micro-batches, rows, tokens]."""
    a = config.gradient_accumulation_steps
    shape = (a, config.batch_size // a, config.max_length)
    types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segment_ids": jnp.int32, "positions": jnp.int32}
    rows = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(None)) for name, dtype in types.items()}
    if config.objective.data == "pairs":
        return {"chosen": rows, "rejected": rows}
    if config.objective.data == "labels":
        return {**rows, "labels": jax.ShapeDtypeStruct(shape[:2], jnp.bool_, sharding=sharding()), "kl": rows}
    return rows


def _remedy(config: TrainConfig, parameters_alone: bool, said: str) -> str:
    ways = []
    if parameters_alone:
        ways.append("parameters and optimiser alone are more than a chip has: more chips")
        if config.adapter is None:
            ways.append("an adapter (lora)")
        elif config.quantize_base is None:
            ways.append("quantize_base: nf4")
        return ", or ".join(ways)
    if config.remat != "full":
        ways.append("remat: full")
    rows = config.mesh.data * config.mesh.fsdp
    if config.batch_size // config.gradient_accumulation_steps > rows:
        ways.append(f"gradient_accumulation_steps: {config.batch_size // rows}")
    ways.append("a shorter max_length, or more chips")
    return ", or ".join(ways) + (f" (the compiler: {said[:300]})" if said else "")
