"""What every objective is: a function of a model and a batch that returns sums."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models import Decoder
from jaxllm.training.backend import Backend
from jaxllm.training.losses import token_log_probs

Batch = Mapping[str, Any]
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, weight): the mean is taken once, over all micro-batches


class Objective(Protocol):
    """`objective(model, batch, key) -> (loss_sum, weight_sum, metrics)`: the loss to minimise is their quotient over a step."""

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[Array, Array, Metrics]: ...


def hidden_states(model: Decoder, batch: Batch, backend: Backend) -> Float[Array, "B T D"]:
    """What the model makes of a batch; packed examples do not see each other."""
    attend = backend.attention(batch["positions"], batch["segment_ids"])
    return model(batch["tokens"], batch["positions"], attend)[0]


def sequence_log_probs(model: Decoder, batch: Batch, backend: Backend) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """For each row the sum of log p(target) over the targets that count, and how many they are."""
    log_p = token_log_probs(model, hidden_states(model, batch, backend), batch["targets"], backend=backend)
    weights = batch["weights"].astype(jnp.float32)
    return jnp.sum(jnp.where(weights != 0, log_p * weights, 0), axis=-1), jnp.sum(weights, axis=-1)


def both(chosen: Batch, rejected: Batch) -> Batch:
    """One batch of both halves of the pairs, the chosen first: one pass through the model."""
    return {name: jnp.concatenate([chosen[name], rejected[name]]) for name in chosen}


def reference_log_probs(model: Decoder, batch: Batch, backend: Backend) -> Batch:
    """The batch with `reference_logps` [B] of a model that stays as it is, wherever a sequence will be compared with it."""
    if "chosen" in batch:
        chosen, rejected = jnp.split(sequence_log_probs(model, both(batch["chosen"], batch["rejected"]), backend)[0], 2)
        pair = {"chosen": chosen, "rejected": rejected}
        return {**batch, **{name: {**batch[name], "reference_logps": logps} for name, logps in pair.items()}}
    extra = {"reference_logps": sequence_log_probs(model, batch, backend)[0]}
    if "kl" in batch:
        extra["kl"] = {**batch["kl"], "reference_logps": sequence_log_probs(model, batch["kl"], backend)[0]}
    return {**batch, **extra}
