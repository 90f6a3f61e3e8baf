"""A reward model: the decoder with one score, learnt from pairs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.models import Decoder
from jaxllm.models.layers import Linear
from jaxllm.training.backend import Backend
from jaxllm.training.objectives.base import Batch, Objective, both, hidden_states
from jaxllm.training.objectives.config import ObjectiveConfig
from jaxllm.training.objectives.preference import _KEYS, _sums


class RewardModel(nnx.Module):
    """A decoder and a linear score of its last hidden state: what transformers calls ForSequenceClassification with one label."""

    def __init__(self, decoder: Decoder, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.decoder = decoder
        self.score = Linear(decoder.config.hidden_size, 1, ("embed", None), dtype=dtype, rngs=rngs)

    def __call__(self, batch: Batch, backend: Backend) -> Float[Array, " B"]:
        """The score of each row's last token that is no padding, float32."""
        hidden = hidden_states(self.decoder, batch, backend)
        last = jnp.maximum(jnp.sum(batch["segment_ids"] != 0, axis=-1) - 1, 0)
        return self.score(hidden[jnp.arange(len(hidden)), last])[:, 0].astype(jnp.float32)


def reward(config: ObjectiveConfig, backend: Backend) -> Objective:
    """-log sigmoid(score(chosen) - score(rejected)) (Ouyang et al., arXiv 2203.02155, section 3.5)."""

    def objective(model, batch, key):
        halves = [{name: batch[half][name] for name in _KEYS} for half in ("chosen", "rejected")]
        chosen, rejected = jnp.split(model(both(*halves), backend), 2)
        losses = -jax.nn.log_sigmoid(chosen - rejected)
        if config.center_rewards_coefficient is not None:
            losses += config.center_rewards_coefficient * jnp.square(chosen + rejected)
        return _sums(batch, losses, chosen, rejected)

    return objective
