"""Optimisers by name, over a flat dict of parameters: `{"blocks.0.mlp.up_proj.weight": array}`."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxllm.errors import ConfigError
from jaxllm.training.optim.adam8bit import scale_by_adam8bit
from jaxllm.training.optim.config import OptimizerConfig, ParamGroup
from jaxllm.training.optim.schedules import Schedule, make_schedule


def make_optimizer(config: OptimizerConfig, params: Mapping[str, Any], total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its rate at each step. `params` (arrays or shapes) tells which parameters there are.

    Weights decay and groups apply after the optimiser's own scaling, and the rate last. Clipping is the step's work.
    Raises ConfigError for a group that fits no parameter.
    """
    unused = [g.pattern for g in config.groups if not any(re.search(g.pattern, name) for name in params)]
    if unused:
        raise ConfigError(f"groups: {', '.join(map(repr, unused))} fits no parameter; some are {', '.join(list(params)[:5])}")
    schedule = make_schedule(config, total_steps)
    decays = {name: _decay(config, name) for name in params}
    rates = {name: group.lr_multiplier if (group := _group(config, name)) else 1.0 for name in params}
    chain = optax.chain(_base(config), _add_decay(decays), _multiply(rates), optax.scale_by_learning_rate(schedule))
    if config.name == "schedule_free":
        return contrib.schedule_free(chain, schedule, b1=config.adam_beta1), schedule
    return chain, schedule


def evaluation_params(config: OptimizerConfig, state: Any, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights to evaluate and export: schedule_free steps at other points than it is good at."""
    return contrib.schedule_free_eval_params(state, params) if config.name == "schedule_free" else params


def _base(config: OptimizerConfig) -> optax.GradientTransformation:
    b1, b2, eps = config.adam_beta1, config.adam_beta2, config.adam_epsilon
    if config.name == "adamw":
        return optax.scale_by_adam(b1, b2, eps)
    if config.name == "adam8bit":
        return scale_by_adam8bit(b1, b2, eps)
    if config.name == "schedule_free":
        return optax.scale_by_adam(0.0, b2, eps)  # the averaging takes the place of the first moment
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2)
    if config.name == "sgd":
        return optax.trace(config.momentum) if config.momentum else optax.identity()
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    # Updates of muon with adamw's root mean square (Liu et al., arXiv 2502.16982), so that one learning rate serves both.
    muon = contrib.muon(
        1.0,
        beta=config.muon_momentum,
        consistent_rms=0.2,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=lambda params: {name: _matrix(name, p) for name, p in params.items()},
    )
    return optax.chain(muon, optax.scale(-1.0))


def _matrix(name: str, p: Any) -> contrib.MuonDimensionNumbers | None:
    """Muon is for the matrices of layers [..., out, in]; embeddings, heads, norms and biases go to adam."""
    inner = name.startswith(("blocks.", "layers.")) and not _plain(name)
    return contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2) if inner and len(p.shape) >= 2 else None


def _plain(name: str) -> bool:
    """Norms and biases; stacked ones have two axes too, so the name decides."""
    return name.endswith("bias") or any("norm" in part for part in name.split("."))


def _group(config: OptimizerConfig, name: str) -> ParamGroup | None:
    return next((group for group in config.groups if re.search(group.pattern, name)), None)


def _decay(config: OptimizerConfig, name: str) -> float:
    group = _group(config, name)
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return 0.0 if _plain(name) else config.weight_decay


def _add_decay(decays: dict[str, float]) -> optax.GradientTransformation:
    add = lambda name, u, p: u + decays[name] * p.astype(u.dtype) if decays[name] else u
    return optax.stateless(lambda updates, params: {name: add(name, u, params[name]) for name, u in updates.items()})


def _multiply(rates: dict[str, float]) -> optax.GradientTransformation:
    scale = lambda name, u: u if rates[name] == 1 else jnp.asarray(rates[name], u.dtype) * u
    return optax.stateless(lambda updates, params: {name: scale(name, u) for name, u in updates.items()})
