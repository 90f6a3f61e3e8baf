"""Settings of optimisers and schedules, named as Hugging Face's TrainingArguments names them."""

import re
from dataclasses import dataclass
from typing import Literal

from jaxllm.errors import ConfigError

OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd", "adam8bit", "schedule_free"]
SchedulerName = Literal["constant", "linear", "cosine", "warmup_stable_decay", "wsd"]


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that move otherwise: those whose name (`blocks.0.self_attn.q_proj.weight`) the pattern is found in."""

    pattern: str
    "A regular expression, searched for in the name; of several groups the first that fits counts."
    lr_multiplier: float = 1.0
    "Times the learning rate; 0 leaves the parameters as they are."
    weight_decay: float | None = None
    "In place of the optimiser's, biases and norms included."

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern {self.pattern!r} is no regular expression ({error})") from error
        if self.lr_multiplier < 0:
            raise ConfigError(f"lr_multiplier must not be negative, got {self.lr_multiplier}")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move."""

    name: OptimizerName = "adamw"
    "adam8bit is adamw with its two states in 8 bits; schedule_free is adamw without a schedule (arXiv 2405.15682)."
    learning_rate: float = 2e-5
    "Peak rate, after the warm-up."
    lr_scheduler_type: SchedulerName = "linear"
    "What follows the warm-up; warmup_stable_decay (wsd) stays at the peak and falls at the end."
    warmup_steps: int = 0
    "Steps over which the rate rises from 0."
    warmup_ratio: float = 0.0
    "The same as a share of all steps; used where warmup_steps is 0."
    min_lr_ratio: float = 0.0
    "What linear, cosine and wsd end at, as a share of the peak."
    decay_ratio: float = 0.2
    "wsd: share of all steps in which the rate falls, linearly."
    weight_decay: float = 0.0
    "Decoupled (arXiv 1711.05101); biases and norms have none, unless a parameter group says so."
    adam_beta1: float = 0.9
    "Of adamw, adam8bit, lion; schedule_free's interpolation; and of the parameters that muon leaves to adam."
    adam_beta2: float = 0.999
    "Of adamw, adam8bit, lion (which wants 0.99), schedule_free and muon's adam."
    adam_epsilon: float = 1e-8
    "Added to the denominator."
    momentum: float = 0.9
    "Of sgd; muon's is 0.95 (`muon_momentum`)."
    muon_momentum: float = 0.95
    "Of muon, Nesterov's."
    max_grad_norm: float | None = 1.0
    "Gradients whose global norm is larger are scaled down to it; null leaves them."
    ema_decay: float | None = None
    "Keep an average of the weights that decays by this each step; evaluation and export use it."
    groups: tuple[ParamGroup, ...] = ()
    "Parameters that move otherwise."

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ConfigError(f"learning_rate must not be negative, got {self.learning_rate}")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("warmup_steps and warmup_ratio say the same thing: give one")
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "momentum", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.adam_epsilon <= 0:
            raise ConfigError("warmup_steps and weight_decay must not be negative, and adam_epsilon must be above 0")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm must be above 0 or null, got {self.max_grad_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be between 0 and 1, got {self.ema_decay}")
        if self.name == "schedule_free" and self.ema_decay is not None:
            raise ConfigError("ema_decay: schedule_free averages the weights itself; leave it out")
        if self.name == "schedule_free" and self.lr_scheduler_type not in ("constant", "linear"):
            raise ConfigError("lr_scheduler_type: schedule_free has none (only the warm-up); leave it out")
        if self.name == "schedule_free" and self.adam_beta1 == 0:
            raise ConfigError("adam_beta1 must be above 0 for schedule_free")
