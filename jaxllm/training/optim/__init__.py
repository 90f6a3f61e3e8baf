"""Optimisers, schedules and parameter groups."""

from jaxllm.training.optim.build import evaluation_params, make_optimizer
from jaxllm.training.optim.config import OptimizerConfig, ParamGroup
from jaxllm.training.optim.schedules import Schedule, make_schedule

__all__ = ["OptimizerConfig", "ParamGroup", "Schedule", "evaluation_params", "make_optimizer", "make_schedule"]
