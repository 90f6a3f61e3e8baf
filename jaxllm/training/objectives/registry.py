"""Objectives by name."""

from jaxllm.training.backend import ONE_DEVICE, Backend
from jaxllm.training.objectives.base import Objective
from jaxllm.training.objectives.config import ObjectiveConfig
from jaxllm.training.objectives.kto import kto
from jaxllm.training.objectives.language_model import language_model
from jaxllm.training.objectives.preference import dpo, orpo, simpo
from jaxllm.training.objectives.reward import reward

OBJECTIVES = {"causal_lm": language_model, "sft": language_model, "dpo": dpo, "orpo": orpo, "kto": kto, "simpo": simpo, "reward": reward}


def make_objective(config: ObjectiveConfig, backend: Backend = ONE_DEVICE) -> Objective:
    return OBJECTIVES[config.name](config, backend)
