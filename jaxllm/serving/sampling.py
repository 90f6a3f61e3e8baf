"""Choosing the next token, on the device, without sorting the vocabulary.

Filters come in vLLM's order: temperature, min_p, top_k, top_p; typical_p comes last, as in transformers. All but min_p are
thresholds, found by bisection: floats ordered as integers have 32 bits, so 32 counting passes find them exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_BLOCK = 256  # of the two-level search for the drawn token


class SamplingArrays(NamedTuple):
    """A batch's sampling parameters, one row a sequence."""

    temperature: Float[Array, " N"]
    top_k: Int[Array, " N"]  # 0: all
    top_p: Float[Array, " N"]
    min_p: Float[Array, " N"]
    typical_p: Float[Array, " N"]
    seed: UInt32[Array, "N 2"]  # high and low half
    position: Int[Array, " N"]  # of the token that is drawn


def sample(logits: Float[Array, "N V"], params: SamplingArrays) -> Int[Array, " N"]:
    """One token a row; rows with temperature 0 take the likeliest. A draw depends on its row, seed and position alone."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        drawn = _inverse_cdf(weights(logits, params), _uniform(params.seed, params.position))
        return jnp.where(params.temperature == 0, greedy, drawn)

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy)


def weights(logits: Float[Array, "N V"], params: SamplingArrays) -> Float[Array, "N V"]:
    """How likely each token is to be drawn, up to a factor: the likeliest has 1, those that the filters leave out have 0."""
    temperature = jnp.where(params.temperature == 0, 1.0, params.temperature)[:, None]
    # The largest is taken off first: a tiny temperature would make infinities of both.
    likeliest = jax.lax.optimization_barrier(jnp.max(logits, axis=-1, keepdims=True))  # else the CPU's bits depend on the number of rows
    probs = jnp.exp((logits - likeliest) / temperature)
    probs = jnp.where(probs < params.min_p[:, None], 0.0, probs)
    # Greedy rows and padding ask for no passes over the vocabulary.
    draws = params.temperature > 0
    filtered = jnp.any(draws & ((params.top_k > 0) | (params.top_p < 1)))
    probs = jax.lax.cond(filtered, lambda p: _top_p(_top_k(p, logits, params.top_k), logits, params.top_p), lambda p: p, probs)
    return jax.lax.cond(jnp.any(draws & (params.typical_p < 1)), lambda p: _typical(p, params.typical_p), lambda p: p, probs)


def _uniform(seed: Array, position: Array) -> Array:
    """A number in [0, 1) for each row from its own key: whoever shares the batch, it is the same."""
    one = lambda s, p: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(s, impl="threefry2x32"), p))
    return jax.vmap(one)(seed, position)


def _likeliest(logits: Array, holds) -> Array:
    """The fewest likeliest tokens of each row, ties of the last included, for which `holds(kept)` [N] is true, as a mask [N, V].

    Logits decide, not probabilities, of which a high temperature makes ties. Floats order as their bits do, once those of
    negative ones are turned round. `holds` must stay true as more tokens are kept; all are kept if it never is.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def step(i, low):
        middle = low + (1 << (31 - i))  # from the most negative int32: the first sum wraps round to 0
        return jnp.where(holds(order >= middle[:, None]), middle, low)

    threshold = jax.lax.fori_loop(0, 32, step, jnp.full(logits.shape[0], jnp.iinfo(jnp.int32).min))
    return order >= threshold[:, None]


def _top_k(probs: Array, logits: Array, k: Array) -> Array:
    """Keeps the k likeliest of each row, and whatever ties with the last of them; k = 0 keeps all."""
    kept = _likeliest(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)
    return jnp.where((k[:, None] > 0) & ~kept, 0.0, probs)


def _top_p(probs: Array, logits: Array, p: Array) -> Array:
    """Keeps the smallest set of likeliest tokens whose share of the sum is at least p, and ties of its last; the likeliest always."""
    wanted = jnp.maximum(p * jnp.sum(probs, axis=-1), jnp.finfo(jnp.float32).tiny)
    kept = _likeliest(logits, lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= wanted)
    return jnp.where((p[:, None] < 1) & ~kept, 0.0, probs)


def _typical(probs: Array, mass: Array) -> Array:
    """Keeps the tokens whose surprise is nearest to the entropy until they have this share of the sum (Meister et al., arXiv
    2202.00666), and ties of the last. At least one stays."""
    total = jnp.sum(probs, axis=-1, keepdims=True)
    surprise = -jnp.log(jnp.where(probs > 0, probs, 1.0) / total)
    entropy = jnp.sum(probs * surprise, axis=-1, keepdims=True) / total
    nearness = jnp.where(probs > 0, -jnp.abs(surprise - entropy), -jnp.inf)
    wanted = jnp.maximum(mass * total[:, 0], jnp.finfo(jnp.float32).tiny)
    kept = _likeliest(nearness, lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= wanted)
    return jnp.where((mass[:, None] < 1) & ~kept, 0.0, probs)


def _inverse_cdf(probs: Array, u: Array) -> Array:
    """The token at which the running sum of each row passes u times the whole: first by blocks, then inside one."""
    rows, vocab = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = u * ends[:, -1]

    def first_past(running, target, weights):
        """The first place where the running sum is past the target and there is weight; the last with weight if rounding left none.

        Asked of the place itself, because a running sum made in parallel may go up, or down, where nothing is added.
        """
        past = (running > target[:, None]) & (weights > 0)
        last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[1]), 0), axis=-1)
        return jnp.where(jnp.any(past, axis=-1), jnp.argmax(past, axis=-1), last)

    block = first_past(ends, target, jnp.max(blocks, axis=-1))
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = first_past(jnp.cumsum(inside, axis=-1), target - before, inside)
    return (block * _BLOCK + place).astype(jnp.int32)
