"""Objectives: `objective(model, batch, key) -> (loss_sum, weight_sum, metrics)`, made by name."""

from jaxllm.training.objectives.base import Batch, Objective, ObjectiveConfig, reference_log_probs, sequence_log_probs
from jaxllm.training.objectives.kto import kto, mismatched
from jaxllm.training.objectives.language_model import language_model
from jaxllm.training.objectives.preference import dpo, orpo, simpo
from jaxllm.training.objectives.reward import RewardModel, reward

OBJECTIVES = {"causal_lm": language_model, "sft": language_model, "dpo": dpo, "orpo": orpo, "kto": kto, "simpo": simpo, "reward": reward}


def make_objective(config: ObjectiveConfig) -> Objective:
    return OBJECTIVES[config.name](config)


__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "ObjectiveConfig",
    "RewardModel",
    "make_objective",
    "mismatched",
    "reference_log_probs",
    "sequence_log_probs",
]
