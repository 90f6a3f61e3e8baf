"""Next-token prediction: continued pre-training and supervised fine-tuning, which differ in the targets that count."""

import jax.numpy as jnp

from jaxllm.training.backend import Backend
from jaxllm.training.losses import cross_entropy
from jaxllm.training.objectives.base import Objective, hidden_states
from jaxllm.training.objectives.config import ObjectiveConfig


def language_model(config: ObjectiveConfig, backend: Backend) -> Objective:
    """The weighted sum of cross-entropy over targets, with label smoothing and z-loss."""

    def objective(model, batch, key):
        weights = batch["weights"].astype(jnp.float32)
        hidden, options = hidden_states(model, batch, backend), dict(label_smoothing=config.label_smoothing, z_loss=config.z_loss)
        loss, parts = cross_entropy(model, hidden, batch["targets"], weights, backend=backend, **options)
        total = jnp.sum(weights)
        plain = not (config.label_smoothing or config.z_loss)  # then the loss is the nll
        return loss, total, {} if plain else {name: (value, total) for name, value in parts.items()}

    return objective
