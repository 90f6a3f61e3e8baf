"""The compiled programs of a step: the whole step at once, or layer by layer.

On TPU and GPU a step is one program that scans over stacked layers. XLA's CPU backend copies every weight that a scan slices,
which halves the speed, and takes 17 s to compile 30 layers unrolled: there one program for each kind of layer is compiled
(1 s) and called for each layer in turn, which costs some 20 us a call.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoints.load import Model
from jaxllm.models import ModelConfig
from jaxllm.serving.attend import paged_attend
from jaxllm.serving.batch import BatchLayout
from jaxllm.serving.sampling import SamplingArrays, sample
from jaxllm.sharding import ShardingRules

_ATTEND = ("page_table", "kv_lens", "query_starts", "counts")


@dataclass
class DeviceState:
    """What stays on the device between steps; each step donates it and gets it back."""

    kv_pages: jax.Array
    last_tokens: jax.Array  # int32 [max_num_seqs]: the token drawn last for the request in each slot


class _Programs:
    """What both ways share."""

    def __init__(self, model: Model, state: DeviceState, *, num_pages: int, mesh: Mesh, rules: ShardingRules):
        self.config: ModelConfig = model.config
        self.mesh, self.whole = mesh, NamedSharding(mesh, PartitionSpec())
        self.pages_sharding = state.kv_pages.sharding
        self._attend = partial(paged_attend, num_pages=num_pages, mesh=mesh, rules=rules)
        self._abstract_state = _abstract((state.kv_pages, state.last_tokens))

    def _buffer(self, layout: BatchLayout) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=self.whole)

    def _compile(self, function, arguments: tuple, *, donate: tuple[int, ...], shardings: Any):
        with jax.set_mesh(self.mesh):
            return jax.jit(function, donate_argnums=donate, out_shardings=shardings).lower(*arguments).compile()


class WholeStep(_Programs):
    """One program a bucket."""

    def __init__(self, model: Model, state: DeviceState, **options: Any):
        super().__init__(model, state, **options)
        self._graph = model.graph
        self._weights, self._tree = jax.tree.flatten(model.params)

    def compile(self, layout: BatchLayout, decode_only: bool):
        arguments = (_abstract(self._weights), *self._abstract_state, self._buffer(layout))
        shardings = (self.whole, self.whole, self.pages_sharding)
        return self._compile(partial(self._step, layout, decode_only), arguments, donate=(1, 2), shardings=shardings)

    def run(self, program, state: DeviceState, buffer: jax.Array) -> jax.Array:
        drawn, state.last_tokens, state.kv_pages = program(self._weights, state.kv_pages, state.last_tokens, buffer)
        return drawn

    def _step(self, layout: BatchLayout, decode_only: bool, weights, kv_pages, last_tokens, buffer):
        batch = layout.unpack(buffer)
        decoder = nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))
        tokens = _input_tokens(batch, last_tokens)
        attend = self._attend(*(batch[name] for name in _ATTEND), decode_only=decode_only)
        hidden, kv_pages = decoder(tokens, batch["positions"], attend, kv_pages, rope_lengths=batch["rope_lengths"])
        return *_draw(decoder, hidden, batch, last_tokens), kv_pages


class LayerByLayer(_Programs):
    """A first and a last program a bucket, and one for each kind of layer."""

    def __init__(self, model: Model, state: DeviceState, **options: Any):
        super().__init__(model, state, **options)
        decoder = nnx.merge(model.graph, model.params)
        self._layers = []
        for i, layer in enumerate(decoder.layers):
            graph, weights = nnx.split(layer, graph=False)
            leaves, tree = jax.tree.flatten(weights)
            number = jax.device_put(jnp.asarray(i, jnp.int32), self.whole)
            self._layers.append((self.config.layers[i], graph, tree, leaves, number))
        decoder.layers = nnx.List([])
        self._graph, ends = nnx.split(decoder, graph=False)
        self._weights, self._tree = jax.tree.flatten(ends)

    def compile(self, layout: BatchLayout, decode_only: bool):
        kv_pages, last_tokens = self._abstract_state
        weights = _abstract(self._weights)
        arguments = (weights, last_tokens, self._buffer(layout))
        first = self._compile(partial(self._first, layout), arguments, donate=(), shardings=self.whole)
        x, ropes, batch = self._shapes(first)
        layers = {}
        for kind, graph, tree, leaves, number in self._layers:
            if kind not in layers:
                arguments = (_abstract(leaves), x, kv_pages, ropes, {name: batch[name] for name in _ATTEND}, _abstract(number))
                function = partial(self._layer, graph, tree, decode_only)
                layers[kind] = self._compile(function, arguments, donate=(1, 2), shardings=(self.whole, self.pages_sharding))
        last = self._compile(self._last, (weights, x, batch, last_tokens), donate=(3,), shardings=self.whole)
        return first, layers, last

    def run(self, program, state: DeviceState, buffer: jax.Array) -> jax.Array:
        first, layers, last = program
        x, ropes, batch = first(self._weights, state.last_tokens, buffer)
        attend = {name: batch[name] for name in _ATTEND}
        for kind, _, _, weights, number in self._layers:
            x, state.kv_pages = layers[kind](weights, x, state.kv_pages, ropes, attend, number)
        drawn, state.last_tokens = last(self._weights, x, batch, state.last_tokens)
        return drawn

    def _shapes(self, program) -> Any:
        """What a program returns, for those that take it in."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.whole), program.out_info)

    def _decoder(self, weights):
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))

    def _first(self, layout: BatchLayout, weights, last_tokens, buffer):
        batch, decoder = layout.unpack(buffer), self._decoder(weights)
        x = decoder.embed(_input_tokens(batch, last_tokens), batch["positions"])
        return x, decoder.rope_tables(batch["positions"], batch["rope_lengths"]), batch

    def _layer(self, graph, tree, decode_only: bool, weights, x, kv_pages, ropes, attend, number):
        layer = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        attend = self._attend(*(attend[name] for name in _ATTEND), decode_only=decode_only)
        return layer(x, ropes, attend, kv_pages, number)

    def _last(self, weights, x, batch, last_tokens):
        decoder = self._decoder(weights)
        return _draw(decoder, decoder.final_norm(x), batch, last_tokens)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _input_tokens(batch: dict[str, jax.Array], last_tokens: jax.Array) -> jax.Array:
    """The tokens that the host named, and for those that it has not read yet, what was drawn last in their slot."""
    return jnp.where(batch["tokens"] < 0, last_tokens[batch["token_slots"]], batch["tokens"])


def _draw(decoder, hidden: jax.Array, batch: dict[str, jax.Array], last_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token for each sequence from its last row, and the table of last tokens with it."""
    last_rows = jnp.maximum(batch["query_starts"][1:] - 1, 0)
    logits = decoder.logits(hidden[last_rows])
    drawn = sample(logits, SamplingArrays(*(batch[name] for name in SamplingArrays._fields)))
    return drawn, last_tokens.at[batch["slots"]].set(drawn, mode="drop")
