"""The decoder that every family is an instance of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Attend, DecoderLayer, Linear, Norm, matmul, parameter
from jaxllm.models.rope import Table, rope_table

# What is kept of a layer (or repeating block) for the backward pass; the rest is computed anew.
REMAT = {
    "full": None,  # its input only
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # projections, but no attention scores
}


class Decoder(nnx.Module):
    """`decoder(tokens, positions, attend, cache) -> (hidden, cache)`; `decoder.logits(hidden)`.

    With `scan_layers`, layers are stacked by repeating block and run by one `lax.scan` (`blocks`: one module for each place
    in the block, its parameters with a leading axis), which keeps compile time constant in depth; what is left over, or
    everything without `scan_layers`, is unrolled (`layers`). Unrolled is faster on the CPU, where a scan copies weights.
    """

    def __init__(self, config: ModelConfig, *, scan_layers: bool = False, dtype=jnp.float32, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.remat: str | None = None  # what the backward pass computes anew: see REMAT
        embed_dim = c.embedding_dim
        self.embed_tokens = parameter((c.vocab_size, embed_dim), ("vocab", "embed"), dtype=dtype, rngs=rngs)
        rows = c.max_positions + c.position_offset
        self.embed_positions = parameter((rows, c.hidden_size), (None, "embed"), dtype=dtype, rngs=rngs) if c.learned_positions else None
        project = embed_dim != c.hidden_size
        self.project_in = Linear(embed_dim, c.hidden_size, (None, "embed"), dtype=dtype, rngs=rngs) if project else None
        self.project_out = Linear(c.hidden_size, embed_dim, ("embed", None), dtype=dtype, rngs=rngs) if project else None
        period = c.period
        repeats = c.num_layers // period if scan_layers else 0
        self.blocks = nnx.List([_stacked(c, j, repeats, dtype, rngs) for j in range(period)] if repeats else [])
        self.layers = nnx.List([DecoderLayer(c, layer, dtype=dtype, rngs=rngs) for layer in c.layers[repeats * period :]])
        self.norm = Norm(c, c.hidden_size, dtype=dtype, rngs=rngs) if c.final_norm else None
        self.lm_head = None if c.tie_embeddings else Linear(embed_dim, c.vocab_size, ("embed", "vocab"), dtype=dtype, rngs=rngs)
        self.virtual = None  # prompt and prefix tuning's tokens: jaxllm.adapters

    def __call__(
        self,
        tokens: Int[Array, "*T"],
        positions: Int[Array, "*T"],
        attend: Attend,
        cache: Any = None,
        *,
        rope_lengths: Int[Array, "*T"] | None = None,
    ) -> tuple[Float[Array, "*T D"], Any]:
        """Hidden states after the last norm, and the cache. `rope_lengths`: see `rope.rope_table`."""
        if self.virtual is not None:
            attend = self.virtual.attend(attend, tokens)
        x, ropes = self.embed(tokens, positions), self.rope_tables(positions, rope_lengths)
        if self.blocks:
            x, cache = self._scan(x, ropes, attend, cache)
        first = self.config.num_layers - len(self.layers)
        for i, layer in enumerate(self.layers):
            x, cache = self._maybe_remat(lambda x, cache, layer=layer, i=i: layer(x, ropes, attend, cache, first + i))(x, cache)
        return self.final_norm(x), cache

    def embed(self, tokens: Int[Array, "*T"], positions: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        """What the first layer gets."""
        c = self.config
        x = self.embed_tokens[...][tokens] if self.virtual is None else self.virtual.embed(self.embed_tokens[...], tokens)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions[...][positions + c.position_offset]
        return x

    def rope_tables(self, positions: Int[Array, "*T"], rope_lengths: Int[Array, "*T"] | None = None) -> dict[str, Table]:
        return {name: rope_table(rope, positions, rope_lengths) for name, rope in self.config.ropes.items()}

    def final_norm(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return x if self.norm is None else self.norm(x)

    def _scan(self, x: Array, ropes, attend: Attend, cache: Any) -> tuple[Array, Any]:
        # The cache is carried, never scanned over: as xs and ys it would be copied whole.
        period = len(self.blocks)
        graphs, states = zip(*(nnx.split(block, graph=False) for block in self.blocks), strict=True)
        repeats = (self.config.num_layers - len(self.layers)) // period

        def body(carry, block):
            x, cache = carry
            states, first = block
            for j, (graph, state) in enumerate(zip(graphs, states, strict=True)):
                x, cache = nnx.merge(graph, state)(x, ropes, attend, cache, first + j)
            return (x, cache), None

        return jax.lax.scan(self._maybe_remat(body), (x, cache), (states, jnp.arange(repeats) * period))[0]

    def _maybe_remat(self, function: Callable) -> Callable:
        # A scan keeps what its body computes anew from being merged with the forward pass, so XLA need not be told to.
        return function if self.remat is None else jax.checkpoint(function, policy=REMAT[self.remat], prevent_cse=not self.blocks)

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Scores of every token of the vocabulary, float32."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.lm_head is not None:
            logits = self.lm_head(hidden)
        else:
            logits = matmul(hidden, self.embed_tokens[...])
        logits = logits.astype(jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _stacked(config: ModelConfig, place: int, repeats: int, dtype, rngs: nnx.Rngs) -> DecoderLayer:
    """The layers at one place of the repeating block, as one module whose parameters have a leading axis [repeats]."""
    make = lambda key: DecoderLayer(config, config.layers[place], dtype=dtype, rngs=nnx.Rngs(params=key))
    graph = nnx.split(nnx.eval_shape(make, jax.random.key(0), graph=False), graph=False)[0]
    state = jax.vmap(lambda key: nnx.split(make(key), graph=False)[1])(jax.random.split(rngs.params(), repeats))
    return nnx.merge(graph, state)
