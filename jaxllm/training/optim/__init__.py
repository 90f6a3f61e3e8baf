"""Optimisers, schedules and parameter groups."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    build=("evaluation_params", "make_optimizer"),
    config=("OptimizerConfig", "ParamGroup"),
    schedules=("Schedule", "make_schedule"),
)
