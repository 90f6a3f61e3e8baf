"""Learning from pairs: DPO, ORPO, SimPO. The weight of a loss counts pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.errors import ConfigError
from jaxllm.training.backend import Backend
from jaxllm.training.objectives.base import Batch, Metrics, Objective, both, sequence_log_probs
from jaxllm.training.objectives.config import ObjectiveConfig

_KEYS = ("tokens", "targets", "weights", "segment_ids", "positions")


def dpo(config: ObjectiveConfig, backend: Backend) -> Objective:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290), and its hinge and IPO forms.

    A batch's halves hold `reference_logps` [B], the sums of log-probabilities of the reference model.
    """

    def objective(model, batch, key):
        (chosen, rejected), (chosen_n, rejected_n) = _pair(model, batch, backend)
        ratio_w = chosen - _reference(batch["chosen"])
        ratio_l = rejected - _reference(batch["rejected"])
        if config.loss_type == "ipo":  # means over tokens, as its authors do (TRL pull request 1265)
            margin = ratio_w / jnp.maximum(chosen_n, 1) - ratio_l / jnp.maximum(rejected_n, 1)
            losses = jnp.square(margin - 1 / (2 * config.beta))
        elif config.loss_type == "hinge":
            losses = jax.nn.relu(1 - config.beta * (ratio_w - ratio_l))
        else:
            margin, e = config.beta * (ratio_w - ratio_l), config.label_smoothing
            losses = -(1 - e) * jax.nn.log_sigmoid(margin) - e * jax.nn.log_sigmoid(-margin)
        return _sums(batch, losses, config.beta * ratio_w, config.beta * ratio_l)

    return objective


def orpo(config: ObjectiveConfig, backend: Backend) -> Objective:
    """Odds-ratio preference optimisation (Hong et al., arXiv 2403.07691): cross-entropy of the chosen answers, and their odds.

    The first part is the mean over the answers' tokens in a micro-batch, as the paper has it (TRL's is over the prompt too); a step of
    several micro-batches averages theirs by pairs.
    """

    def objective(model, batch, key):
        (chosen, rejected), (chosen_n, rejected_n) = _pair(model, batch, backend)
        nll = -jnp.sum(chosen) / jnp.maximum(jnp.sum(chosen_n), 1)
        w, l = chosen / jnp.maximum(chosen_n, 1), rejected / jnp.maximum(rejected_n, 1)  # noqa: E741
        odds = (w - l) - (_log1mexp(w) - _log1mexp(l))
        losses = nll - config.beta * jax.nn.log_sigmoid(odds)
        loss, total, metrics = _sums(batch, losses, config.beta * w, config.beta * l)
        return loss, total, metrics | {"nll": (nll * total, total)}

    return objective


def simpo(config: ObjectiveConfig, backend: Backend) -> Objective:
    """Simple preference optimisation (Meng et al., arXiv 2405.14734): mean log-probabilities, a margin, no reference."""

    def objective(model, batch, key):
        (chosen, rejected), (chosen_n, rejected_n) = _pair(model, batch, backend)
        w, l = chosen / jnp.maximum(chosen_n, 1), rejected / jnp.maximum(rejected_n, 1)  # noqa: E741
        losses = -jax.nn.log_sigmoid(config.beta * (w - l) - config.simpo_gamma)
        return _sums(batch, losses, config.beta * w, config.beta * l)

    return objective


def _pair(model, batch, backend: Backend) -> tuple[list[Array], list[Array]]:
    """Sums of log-probabilities and counts of targets, each of the chosen and of the rejected."""
    halves = [{name: batch[half][name] for name in _KEYS} for half in ("chosen", "rejected")]
    sums, counts = sequence_log_probs(model, both(*halves), backend)
    return jnp.split(sums, 2), jnp.split(counts, 2)


def _reference(half) -> Array:
    if "reference_logps" not in half:
        raise ConfigError("this objective compares with a reference model: pass batches through `reference_log_probs` first")
    return jax.lax.stop_gradient(half["reference_logps"].astype(jnp.float32))


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    x = jnp.minimum(x, -1e-7)
    return jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def _sums(batch: Batch, losses: Array, chosen: Array, rejected: Array) -> tuple[Array, Array, Metrics]:
    # A last batch has empty rows, which are no pairs; nor is one whose answer was cut off.
    has_answer = lambda half: jnp.any(batch[half]["weights"] != 0, axis=-1)
    real = (has_answer("chosen") & has_answer("rejected")).astype(jnp.float32)
    total = jnp.sum(real)
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    metrics = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "rewards_margin": chosen - rejected,
        "rewards_accuracy": (chosen > rejected).astype(jnp.float32),
    }
    of_pairs = lambda x: jnp.sum(jnp.where(real > 0, x, 0))
    return of_pairs(losses), total, {name: (of_pairs(value), total) for name, value in metrics.items()}
