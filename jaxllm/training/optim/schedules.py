"""Learning rates over a run, as transformers computes them (but wsd falls linearly): the first step of a warm-up has rate 0."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.errors import ConfigError
from jaxllm.training.optim.config import OptimizerConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The rate at each step, counted from 0. Raises ConfigError if the warm-up is longer than the run."""
    warmup = config.warmup_steps or int(-(-config.warmup_ratio * total_steps // 1))
    if warmup > total_steps:
        raise ConfigError(f"warmup_steps={warmup} is more than the {total_steps} steps of the run")
    kind = "constant" if config.name == "schedule_free" else config.lr_scheduler_type
    low = config.min_lr_ratio
    decay = max(1, round(config.decay_ratio * total_steps))

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0, 1)
        after = {
            "constant": lambda: jnp.ones_like(step),
            "linear": lambda: low + (1 - low) * (1 - progress),
            "cosine": lambda: low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "warmup_stable_decay": lambda: low + (1 - low) * jnp.clip((total_steps - step) / decay, 0, 1),
        }["warmup_stable_decay" if kind == "wsd" else kind]()
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), after)

    return schedule
