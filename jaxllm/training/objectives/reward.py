"""A reward model: the decoder with one score, learnt from pairs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxllm.adapters import SavedParam
from jaxllm.models import Decoder
from jaxllm.models.layers import matmul, parameter
from jaxllm.training.backend import Backend
from jaxllm.training.objectives.base import Batch, Objective, both, hidden_states
from jaxllm.training.objectives.config import ObjectiveConfig
from jaxllm.training.objectives.preference import _KEYS, _sums


class Score(nnx.Module):
    """What stands in the place of the output layer: a row of weights [1, D], drawn as transformers draws them."""

    def __init__(self, width: int, pad_token_id: int | None, *, saved: bool, dtype=jnp.float32, rngs: nnx.Rngs):
        weight = parameter((1, width), (None, "embed"), dtype=dtype, rngs=rngs)
        self.weight = SavedParam(weight[...], logical_axes=weight.logical_axes) if saved else weight
        self.pad_token_id = pad_token_id


def without_head(decoder: Decoder) -> Decoder:
    """The decoder without its output layer, which a reward model has no use for; a tied one stays, as the embedding."""
    decoder = nnx.merge(*nnx.split(decoder, graph=False))
    decoder.lm_head, decoder.config = nnx.static(None), replace(decoder.config, tie_embeddings=True)
    return decoder


def add_score(decoder: Decoder, *, pad_token_id: int | None = None, saved: bool = False, dtype=jnp.float32, rngs: nnx.Rngs) -> Decoder:
    """The decoder with a score: what transformers calls ForSequenceClassification with one label. The weight is new, and placed on
    the devices that the decoder is on; `saved`: trained and saved with the decoder's adapter."""
    decoder = nnx.merge(*nnx.split(decoder, graph=False))
    base = decoder.embed_tokens[...]
    decoder.score = Score(base.shape[-1], pad_token_id, saved=saved, dtype=dtype, rngs=rngs)
    if isinstance(sharding := getattr(base, "sharding", None), NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        decoder.score.weight = decoder.score.weight.replace(jax.device_put(decoder.score.weight[...], whole))
    return decoder


def scores(model: Decoder, batch: Batch, backend: Backend) -> Float[Array, " B"]:
    """The score of each row's last token that is no padding, float32. As in transformers, the padding token is none wherever it stands."""
    hidden, real = hidden_states(model, batch, backend), batch["segment_ids"] != 0
    if model.score.pad_token_id is not None:
        real &= batch["tokens"] != model.score.pad_token_id
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=-1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    if model.project_out is not None:
        hidden = model.project_out(hidden)
    return matmul(hidden, model.score.weight[...].astype(hidden.dtype))[:, 0].astype(jnp.float32)


def reward(config: ObjectiveConfig, backend: Backend) -> Objective:
    """-log sigmoid(score(chosen) - score(rejected)) (Ouyang et al., arXiv 2203.02155, section 3.5)."""

    def objective(model, batch, key):
        halves = [{name: batch[half][name] for name in _KEYS} for half in ("chosen", "rejected")]
        chosen, rejected = jnp.split(scores(model, both(*halves), backend), 2)
        losses = -jax.nn.log_sigmoid(chosen - rejected)
        if config.center_rewards_coefficient is not None:
            losses += config.center_rewards_coefficient * jnp.square(chosen + rejected)
        return _sums(batch, losses, chosen, rejected)

    return objective
