"""What a run computes, made from its settings: the same from arrays, by the trainer, and from shapes, by a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.adapters import adapter_disabled, add_adapter, is_trainable, quantize_base, with_dropout
from jaxllm.errors import ConfigError
from jaxllm.models import Decoder
from jaxllm.sharding import ShardingRules
from jaxllm.training.backend import Backend, backend_for
from jaxllm.training.config import TrainConfig
from jaxllm.training.objectives import Objective, make_objective, reference_log_probs
from jaxllm.training.optim import Schedule, make_optimizer
from jaxllm.training.parts import ModelParts, Params, split_model
from jaxllm.training.step import StepConfig, TrainState, make_evaluation_step, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """The functions of a run, and the model they are of."""

    parts: ModelParts
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: Schedule
    settings: StepConfig
    dropout: bool

    def train_step(self, state: TrainState) -> Callable:
        """See `make_train_step`."""
        training = self.objective
        if self.dropout:
            training = lambda model, batch, key: self.objective(with_dropout(model, key), batch, key)
        return make_train_step(self.parts, training, self.optimizer, self.schedule, self.settings, state)

    def evaluation_step(self) -> Callable:
        """See `make_evaluation_step`."""
        return make_evaluation_step(self.parts, self.objective, self.settings.precision)


def make_program(
    config: TrainConfig, decoder: Decoder, mesh: Mesh, rules: ShardingRules, total_steps: int
) -> tuple[TrainProgram, Params, Params]:
    """The program of a decoder that is `prepared`, the parameters it trains and those it leaves."""
    parts, trainable, frozen = split_model(decoder, is_trainable if config.adapter is not None else None)
    optimizer, schedule = make_optimizer(config.optimizer, trainable, total_steps)
    settings = StepConfig(config.precision, config.optimizer.max_grad_norm, config.optimizer.ema_decay)
    objective = make_training_objective(config, backend_for(mesh, rules))
    dropout = config.lora is not None and config.lora.lora_dropout > 0
    return TrainProgram(parts, objective, optimizer, schedule, settings, dropout), trainable, frozen


def stored_dtype(config: TrainConfig) -> Any:
    """Of the model's parameters: what is trained is kept in float32, unless that is not wanted; what is not trained needs no more than
    it computes with."""
    wide = config.precision == "float32" or (config.precision == "bfloat16_mixed" and config.adapter is None)
    return jnp.float32 if wide else jnp.bfloat16


def prepared(decoder: Decoder, config: TrainConfig) -> Decoder:
    """The decoder as it is trained: its weights in few bits, its adapter, and what its backward pass computes anew."""
    if config.quantize_base is not None:
        decoder = quantize_base(decoder, config.quantize_base)
    if config.adapter is not None:
        decoder = add_adapter(decoder, config.adapter, rngs=nnx.Rngs(params=config.seed))
    decoder.remat = None if config.remat == "none" else config.remat
    return decoder


def make_training_objective(config: TrainConfig, backend: Backend) -> Objective:
    """The objective; where it compares with a reference, that is the model without its adapter. Raises ConfigError if there is none."""
    objective = make_objective(config.objective, backend)
    if config.objective.name == "reward":
        raise ConfigError("reward: the trainer has no score head yet; use jaxllm.training.objectives.RewardModel with a step of your own")
    if not config.objective.needs_reference:
        return objective
    if config.adapter is None:
        raise ConfigError(f"{config.objective.name} compares with the model as it was, which is kept only under an adapter: give lora")

    def with_reference(model, batch, key):
        reference = jax.lax.stop_gradient(reference_log_probs(adapter_disabled(model), batch, backend))
        return objective(model, reference, key)

    return with_reference
