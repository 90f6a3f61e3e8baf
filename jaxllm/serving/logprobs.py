"""Log-probabilities of drawn tokens and of prompts, from the logits as the model gave them (vLLM's `raw_logprobs`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_sum import row_sum


class TokenLogprobs(NamedTuple):
    """Of one token in each row, and of the K likeliest."""

    logprob: Float[Array, " N"]
    rank: Int[Array, " N"]  # 1: none is likelier
    top_ids: Int[Array, "N K"]
    top_logprobs: Float[Array, "N K"]


def token_logprobs(logits: Float[Array, "N V"], tokens: Int[Array, " N"], k: int) -> TokenLogprobs:
    top = jax.lax.optimization_barrier(jnp.max(logits, axis=-1, keepdims=True))
    logprobs = logits - top - jnp.log(row_sum(jnp.exp(logits - top)))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, k)
    return TokenLogprobs(chosen[:, 0], jnp.sum(logprobs > chosen, axis=-1) + 1, top_ids, top_logprobs)


def no_logprobs(rows: int, k: int) -> TokenLogprobs:
    """In the place of those that nobody has asked for."""
    zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((rows, *shape), dtype)
    return TokenLogprobs(zeros(), zeros(dtype=jnp.int32), zeros(k, dtype=jnp.int32), zeros(k))
