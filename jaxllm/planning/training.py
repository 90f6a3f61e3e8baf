"""Fine-tuning, planned: the step that the trainer would run, compiled for where it would run it, and what that says."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.host_memory import total_bytes
from jaxllm.models import Decoder, ModelConfig
from jaxllm.planning.abstract import bytes_on_a_device
from jaxllm.planning.chips import Topology
from jaxllm.planning.hlo import Collective, Program, memory
from jaxllm.sharding import ShardingRules, fit_to_model, make_mesh
from jaxllm.training.config import TrainConfig
from jaxllm.training.metrics import training_flops
from jaxllm.training.model import prepared, stored_dtype
from jaxllm.training.parts import Params
from jaxllm.training.program import TrainProgram, make_program
from jaxllm.training.step import TrainState, abstract_state, init_state


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
    step = _abstract_step(config, model, devices)
    settings = {
        "topology": topology.name,
        "chip": topology.chip.name,
        "bandwidth": topology.chip.bandwidth,
        "peak_flops": topology.chip.flops,
        "mesh": {"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor},
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "precision": config.precision,
        "remat": config.remat,
        "adapter": None if config.adapter is None else config.adapter.peft_type.lower(),
        "quantize_base": config.quantize_base,
        "trainable_parameters": sum(math.prod(x.shape) for x in step.state.params.values()),
    }
    capacity = topology.chip.memory_bytes
    compiled, said = step.compile()
    bytes_, seconds = step.held(compiled) | {"capacity": capacity}, time.perf_counter() - start
    total = bytes_["total"]
    if compiled is None:
        return TrainingPlan(False, bytes_, None, seconds, _remedy(config, total > capacity, said), settings)
    cost = Program(compiled.as_text(), topology.chip.platform).cost()
    tokens = tokens_of(config)
    least = training_flops(model, tokens * config.max_length, tokens, frozen=config.adapter is not None) / used
    flops = cost.kernel_flops + cost.product_flops
    bound = max(cost.hbm_bytes / topology.chip.bandwidth, flops / topology.chip.flops)
    report = TrainStepReport(
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
    return TrainingPlan(fits, bytes_, report, seconds, None if fits else _remedy(config, False, ""), settings)


def tokens_of(config: TrainConfig) -> int:
    """Places for tokens in a step."""
    return config.batch_size * config.max_length * (2 if config.objective.data == "pairs" else 1)


@dataclass(frozen=True)
class _AbstractStep:
    """The trainer's step and what it is given, as shapes with places on a mesh."""

    program: TrainProgram
    state: TrainState
    frozen: Params
    batch: dict[str, Any]

    def compile(self) -> tuple[Any, str]:
        """The program; or None, and what the compiler said, where it refused for want of memory."""
        try:
            return self.program.train_step(self.state).lower(self.state, self.frozen, self.batch).compile(), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, str(error)

    def held(self, compiled: Any) -> dict[str, int]:
        """Bytes on a device; only what is known beforehand where there is no program."""
        state = self.state
        parameters, optimizer = bytes_on_a_device((state.params, self.frozen)), bytes_on_a_device((state.opt_state, state.ema))
        temporaries = other = 0
        if compiled is not None:
            held = memory(compiled)
            temporaries, other = held["temporaries"], held["arguments"] - parameters - optimizer + held["results"] + held["code"]
        bytes_ = {"parameters": parameters, "optimizer": optimizer, "temporaries": temporaries, "other": other}
        return bytes_ | {"total": sum(bytes_.values())}


def _abstract_step(config: TrainConfig, model: ModelConfig, devices: Sequence[Any]) -> _AbstractStep:
    if config.max_length > model.max_positions:
        raise ConfigError(f"max_length={config.max_length} exceeds the model's {model.max_positions} positions")
    sizes = config.mesh
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
    return _AbstractStep(program, state, frozen, batch)


@dataclass(frozen=True)
class MeasuredStep:
    """An optimiser step on the devices of this machine. `per_device_bytes` are as compiled; `capacity` is what a device has, of the
    CPU's devices each its part of the host's memory. `step_s` was measured, and is None where the step would not fit."""

    fits: bool
    per_device_bytes: dict[str, int]
    tokens: int
    compile_s: float
    step_s: float | None
    tokens_per_s: float | None


def measure_step(config: TrainConfig, model: ModelConfig) -> MeasuredStep:
    """Compiles the step for this machine and, where it fits, takes it on rows that are full: once to warm up, then timed. Parameters
    are zeros: products take the same time. Raises ConfigError for settings that cannot be."""
    start = time.perf_counter()
    step = _abstract_step(config, model, jax.devices())
    compiled, _ = step.compile()
    compile_s = time.perf_counter() - start
    sizes = config.mesh
    used = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor]
    bytes_ = step.held(compiled) | {"capacity": _capacity(used)}
    fits, seconds = compiled is not None and bytes_["total"] <= bytes_["capacity"], None
    if fits:
        zeros = lambda shapes: {name: jnp.zeros(x.shape, x.dtype, device=x.sharding) for name, x in shapes.items()}
        state = init_state(zeros(step.state.params), step.program.optimizer, step.program.settings, config.seed)
        frozen, batch = zeros(step.frozen), jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), step.batch)
        for _ in range(2):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
            seconds = time.perf_counter() - start
    tokens = tokens_of(config)
    return MeasuredStep(fits, bytes_, tokens, compile_s, seconds, None if seconds is None else tokens / seconds)


def _capacity(devices: Sequence[jax.Device]) -> int:
    if (stats := devices[0].memory_stats() if devices[0].platform != "cpu" else None) is not None:
        return int(stats["bytes_limit"])
    return total_bytes() // len(devices)


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
