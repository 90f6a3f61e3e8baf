"""Cross-entropy and log-probabilities from hidden states, a chunk of tokens at a time: the logits [B, T, vocab] never exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models import Decoder

CHUNK = 512  # tokens; with a vocabulary of 128k, 256 MiB of float32 logits


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight. `loss` is what to minimise, `cross_entropy` the same without extras."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    correct: Float[Array, ""]  # tokens whose target is the likeliest


def token_cross_entropy(
    decoder: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> LossSums:
    """-log p(target), in float32. `z_loss` adds its multiple of log(Z)^2 (Chowdhery et al., arXiv 2204.02311, section 5);
    `label_smoothing` gives that share of each target evenly to the whole vocabulary (Szegedy et al., arXiv 1512.00567, section 7).
    """

    def of_chunk(h, target, weight):
        logits = decoder.logits(h)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        cross_entropy = log_z - picked
        loss = cross_entropy
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - logits.mean(axis=-1))
        if z_loss:
            loss += z_loss * jnp.square(log_z)
        correct = jnp.argmax(logits, axis=-1) == target
        # Not a product: 0 x inf would be NaN where a weightless token's logits have overflowed.
        total = lambda x: jnp.sum(jnp.where(weight > 0, x * weight, 0.0))
        return LossSums(total(loss), jnp.sum(weight), total(cross_entropy), total(correct.astype(jnp.float32)))

    sums = lambda carry, x: (jax.tree.map(jnp.add, carry, jax.checkpoint(of_chunk)(*x)), None)
    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    return jax.lax.scan(sums, zero, _chunks(hidden, targets, weights, chunk=chunk))[0]


def token_logprobs(
    decoder: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, chunk: int = CHUNK
) -> Float[Array, "B T"]:
    """log p(target) of each token, float32."""

    def of_chunk(h, target):
        logits = decoder.logits(h)
        return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(lambda x: jax.checkpoint(of_chunk)(*x), _chunks(hidden, targets, chunk=chunk))  # [chunks, B, T / chunks]
    return jnp.moveaxis(out, 0, 1).reshape(targets.shape[0], -1)[:, : targets.shape[1]]


def _chunks(*arrays: Array, chunk: int) -> tuple[Array, ...]:
    """[B, T, ...] as [chunks, B, t, ...] with B t near `chunk`: every chunk has a part of each row, so that a batch that is split over
    devices stays split."""
    rows, length = arrays[0].shape[:2]
    each = max(1, min(length, chunk // rows))
    count = -(-length // each)
    each = -(-length // count)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * each - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, each, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)
