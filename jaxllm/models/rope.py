"""Rotary position embeddings: frequencies of every published scaling, tables of cosines and sines, and their application."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.models.config import RopeConfig

Table = tuple[Float[Array, "*T R"], Float[Array, "*T R"]]


def _inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians a position for each pair of features, [dim // 2], of the kinds that depend on nothing else."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    inv = rope.theta**-exponents
    if rope.kind == "linear":
        return inv / rope.factor
    if rope.kind == "llama3":  # Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a ramp between
        wavelengths = 2 * math.pi / inv
        ramp = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        ramp = np.clip(ramp, 0, 1)
        return inv / rope.factor * (1 - ramp) + inv * ramp
    if rope.kind == "yarn":  # Peng et al., arXiv 2309.00071, section 3.2
        turns = lambda n: rope.dim * math.log(rope.original_max_positions / (n * 2 * math.pi)) / (2 * math.log(rope.theta))
        low, high = turns(rope.beta_fast), turns(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return inv / rope.factor * ramp + inv * (1 - ramp)
    return inv


def rope_table(rope: RopeConfig, positions: Int[Array, "*T"], lengths: Int[Array, "*T"] | None = None) -> Table:
    """Cosines and sines for each token, float32, [*T, dim // 2] each.

    `lengths` gives each token the sequence length that its angles are computed for; only `dynamic` and `longrope` read it.
    transformers recomputes those angles as the sequence grows and leaves cached keys as they were: a prompt's tokens see the
    length of the whole prompt, a generated token sees its own position + 1. Passing max(prompt length, position + 1) gives
    the same whether the prompt was computed at once, in chunks, or again after preemption. None: the largest position + 1
    along the last axis.
    """
    if rope.depends_on_length:
        if lengths is None:
            lengths = jnp.broadcast_to(jnp.max(positions, axis=-1, keepdims=True) + 1, positions.shape)
        lengths = lengths[..., None].astype(jnp.float32)
    exponents = jnp.asarray(np.arange(0, rope.dim, 2) / rope.dim, jnp.float32)
    if rope.kind == "dynamic":  # NTK-aware: the base grows with the length
        stretch = rope.factor * jnp.maximum(lengths, rope.original_max_positions) / rope.original_max_positions - (rope.factor - 1)
        inv = (rope.theta * stretch ** (rope.dim / (rope.dim - 2))) ** -exponents
    elif rope.kind == "longrope":  # Ding et al., arXiv 2402.13753
        base = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim)
        short, long = (jnp.asarray(base / np.asarray(f), jnp.float32) for f in (rope.short_factors, rope.long_factors))
        inv = jnp.where(lengths > rope.original_max_positions, long, short)
    else:
        inv = jnp.asarray(_inverse_frequencies(rope), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inv
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: Float[Array, "*T H D"], table: Table) -> Float[Array, "*T H D"]:
    """Rotate the first 2 R features of each head, pairing feature i with i + R (the Hugging Face order); the rest pass."""
    cos, sin = (t[..., None, :] for t in table)
    r = cos.shape[-1]
    a, b, rest = x[..., :r].astype(jnp.float32), x[..., r : 2 * r].astype(jnp.float32), x[..., 2 * r :]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
