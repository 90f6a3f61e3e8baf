"""What a run computes, made from its settings: the same from arrays, by the trainer, and from shapes, by a plan."""

from collections.abc import Callable
from dataclasses import dataclass

import optax
from jax.sharding import Mesh

from jaxllm.adapters import with_dropout
from jaxllm.models import Decoder
from jaxllm.sharding import ShardingRules
from jaxllm.training.backend import backend_for
from jaxllm.training.config import TrainConfig
from jaxllm.training.model import objective_of, trains
from jaxllm.training.objectives import Objective
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
    """The program of a decoder that is `model.prepared`, the parameters it trains and those it leaves."""
    parts, trainable, frozen = split_model(decoder, trains(config))
    optimizer, schedule = make_optimizer(config.optimizer, trainable, total_steps)
    settings = StepConfig(config.precision, config.optimizer.max_grad_norm, config.optimizer.ema_decay)
    objective = objective_of(config, backend_for(mesh, rules))
    dropout = config.lora is not None and config.lora.lora_dropout > 0
    return TrainProgram(parts, objective, optimizer, schedule, settings, dropout), trainable, frozen
