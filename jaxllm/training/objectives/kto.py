"""Learning from examples that are good or bad, unpaired: KTO."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.training.backend import Backend
from jaxllm.training.objectives.base import Batch, Objective, sequence_log_probs
from jaxllm.training.objectives.config import ObjectiveConfig
from jaxllm.training.objectives.preference import _reference


def kto(config: ObjectiveConfig, backend: Backend) -> Objective:
    """Kahneman-Tversky optimisation (Ethayarajh et al., arXiv 2402.01306).

    The batch holds `labels` bool [B], `reference_logps` [B], and under `kl` a batch of prompts with others' answers (`mismatched`)
    that the divergence from the reference is estimated on, within the micro-batch, as in TRL.
    """

    def objective(model, batch, key):
        if "kl" not in batch:
            raise ConfigError("kto: the batch has no `kl` part; make it with `mismatched(batch)`")
        unpaired = jax.lax.stop_gradient({k: v for k, v in batch["kl"].items() if k != "reference_logps"})
        kl_policy = sequence_log_probs(model, unpaired, backend)[0]
        pairs = jnp.any(batch["kl"]["weights"] != 0, axis=-1)
        kl = jnp.sum(jnp.where(pairs, kl_policy - _reference(batch["kl"]), 0)) / jnp.maximum(jnp.sum(pairs), 1)
        kl = jax.lax.stop_gradient(jnp.maximum(kl, 0))
        ratio = sequence_log_probs(model, batch, backend)[0] - _reference(batch)
        good = batch["labels"]
        # Neither desirable nor undesirable: what the fixed shape of a batch makes up, an empty row.
        real = jnp.any(batch["weights"] != 0, axis=-1).astype(jnp.float32)
        losses = jnp.where(
            good,
            config.desirable_weight * (1 - jax.nn.sigmoid(config.beta * (ratio - kl))),
            config.undesirable_weight * (1 - jax.nn.sigmoid(config.beta * (kl - ratio))),
        )
        rewards = jax.lax.stop_gradient(config.beta * ratio)
        n_good, n_bad = jnp.sum(real * good), jnp.sum(real * ~good)
        metrics = {
            "rewards_chosen": (jnp.sum(real * jnp.where(good, rewards, 0)), n_good),
            "rewards_rejected": (jnp.sum(real * jnp.where(good, 0, rewards)), n_bad),
            "kl": (kl * jnp.sum(real), jnp.sum(real)),
        }
        return jnp.sum(real * losses), jnp.sum(real), metrics

    return objective


def mismatched(batch: Batch) -> Batch:
    """On the host: the batch with `kl`, each prompt followed by the answer of the row before (of the last, for the first), as TRL pairs
    them, and cut where the row ends. Rows of one example alone, or without any, are left empty.

    A row's prompt is what stands before its first target that counts. Raises ConfigError for a batch of one row, as TRL does:
    a prompt with its own answer is no estimate.
    """
    rows, length = np.shape(batch["tokens"])
    if rows < 2:
        raise ConfigError("kto needs at least 2 examples in a micro-batch, to pair prompts with the answers of others")
    tokens, targets, weights = (np.asarray(batch[name]) for name in ("tokens", "targets", "weights"))
    out = {name: np.zeros((rows, length), kind) for name, kind in _KINDS.items()}
    starts = np.argmax(weights != 0, axis=1)
    filled = [i for i in range(rows) if (weights[i] != 0).any()]
    for i, j in zip(filled, filled[-1:] + filled[:-1], strict=True) if len(filled) > 1 else ():
        answer = targets[j][weights[j] != 0]
        whole = np.concatenate([tokens[i, : starts[i] + 1], answer])[: length + 1]
        n = max(len(whole) - 1, 0)
        out["tokens"][i, :n], out["targets"][i, :n] = whole[:-1], whole[1:]
        out["weights"][i, starts[i] : n] = 1
        out["segment_ids"][i, :n], out["positions"][i, :n] = 1, np.arange(n)
    return {**batch, "kl": out}


_KINDS = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segment_ids": np.int32, "positions": np.int32}
