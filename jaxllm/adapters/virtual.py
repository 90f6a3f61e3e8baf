"""Prompt and prefix tuning: tokens that no text has, put before the text, whose embeddings or keys and values are learned."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.adapters.config import AdapterConfig, PrefixTuningConfig
from jaxllm.adapters.variables import AdapterParam
from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig
from jaxllm.models.layers import Attend


class VirtualTokens(nnx.Module):
    """The learned part of prompt tuning ([n, D]) or prefix tuning ([n, layers * 2 * kv_heads * head_dim]).

    The n tokens have the ids after the vocabulary's, `vocab_size + arange(n)`, and stand before each text (`prepend_virtual_tokens`).
    """

    def __init__(self, model: ModelConfig, config: AdapterConfig, embed_tokens: nnx.Param, *, rngs: nnx.Rngs, dtype=jnp.float32):
        n = config.num_virtual_tokens
        self.vocab_size, self.count, self.prefix = model.vocab_size, n, isinstance(config, PrefixTuningConfig)
        self.heads = (model.num_layers, 2, model.num_kv_heads, model.head_dim)
        if not self.prefix and (model.embed_scale != 1.0 or model.embed_dim is not None):
            raise ConfigError(
                f"prompt tuning is not implemented for {model.family} models that scale or project their embeddings: use LoRA"
            )
        if self.prefix:
            shape = (n, int(np.prod(self.heads)))
            value = jnp.zeros(shape, dtype) if config.init_weights == "zero" else jax.random.normal(rngs.params(), shape, dtype)
        elif config.prompt_tuning_init == "SAMPLE_VOCAB":
            value = embed_tokens[...][jax.random.randint(rngs.params(), (n,), 0, model.vocab_size)].astype(dtype)
        else:
            value = jax.random.normal(rngs.params(), (n, model.hidden_size), dtype)
        self.prompt_embeddings = AdapterParam(value, logical_axes=(None, None))

    def _index(self, tokens: Array) -> tuple[Array, Array]:
        """Which tokens are virtual, and the number of each (0 where it is not one)."""
        virtual = tokens >= self.vocab_size
        return virtual, jnp.where(virtual, jnp.clip(tokens - self.vocab_size, 0, self.count - 1), 0)

    def embed(self, table: Float[Array, "V D"], tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        virtual, index = self._index(tokens)
        x = table[jnp.where(virtual, 0, tokens)]
        if self.prefix:
            return x  # its keys and values are replaced in every layer: nobody sees it
        return jnp.where(virtual[..., None], self.prompt_embeddings[...][index].astype(x.dtype), x)

    def attend(self, attend: Attend, tokens: Int[Array, "*T"]) -> Attend:
        """`attend` with the keys and values of virtual tokens replaced by the learned ones (prefix tuning only)."""
        if not self.prefix:
            return attend
        virtual, index = self._index(tokens)
        learned = self.prompt_embeddings[...].reshape(self.count, *self.heads)
        mask = virtual[..., None, None]

        def with_prefix(q, k, v, cache, layer, **options):
            its = jnp.take(learned, layer, axis=1)[index].astype(k.dtype)
            return attend(q, jnp.where(mask, its[..., 0, :, :], k), jnp.where(mask, its[..., 1, :, :], v), cache, layer, **options)

        return with_prefix


def prepend_virtual_tokens(batch: Mapping[str, np.ndarray], model: ModelConfig, count: int) -> dict[str, np.ndarray]:
    """A training batch [B, T] with `count` virtual tokens before the one example of each row: [B, count + T], no loss on them.

    Raises ConfigError for packed rows.
    """
    segments = np.asarray(batch["segment_ids"])
    if segments.max(initial=0) > 1:
        raise ConfigError("prompt and prefix tuning take one example a row: turn packing off")
    rows = len(segments)
    here = np.broadcast_to(np.arange(count, dtype=np.int32), (rows, count))
    fills = {"tokens": model.vocab_size + here, "positions": here, "segment_ids": np.ones_like(here)}
    shift = {"positions": count}
    out = {}
    for name, values in batch.items():
        values = np.asarray(values)
        if values.ndim < 2:  # a label a row
            out[name] = values
            continue
        first = fills.get(name, np.zeros((rows, count))).astype(values.dtype)
        out[name] = np.concatenate([first, values + np.asarray(shift.get(name, 0), values.dtype)], axis=1)
    return out
