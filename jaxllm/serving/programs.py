"""The compiled programs of a step: all layers at once, or layer by layer, and then what turns hidden states into tokens.

On TPU and GPU the layers are one program that scans over their stacked weights. XLA's CPU backend copies every weight that a
scan slices, which halves the speed, and takes 17 s to compile 30 layers unrolled: there one program for each kind of layer is
compiled (1 s) and called for each layer in turn, which costs some 20 us a call. What draws tokens depends on the number of
sequences only, and takes TPU's compiler as long as the layers of a decode step: it is compiled once for all steps that have as
many. Until it begins, masks for structured output may still be made.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxllm.checkpoints.load import Model
from jaxllm.models import ModelConfig
from jaxllm.serving.attend import paged_attend
from jaxllm.serving.batch import BatchLayout, Bucket, step_layout
from jaxllm.serving.executables import ExecutableCache
from jaxllm.serving.logits import LogitsProcessor, process_logits
from jaxllm.serving.logprobs import TokenLogprobs, no_logprobs, token_logprobs
from jaxllm.serving.pooling import PROMPT_BLOCK
from jaxllm.serving.sampling import SamplingArrays, sample
from jaxllm.serving.slot_state import LOGPROBS, SlotState
from jaxllm.sharding import ShardingRules
from pallas_kernels.ragged_paged_attention import Table

_ATTEND = ("page_table", "kv_lens", "query_starts", "counts")
_HEAD = tuple(sorted({*SamplingArrays._fields, "slots", "num_prompt", "features", "processor", "presence", "frequency", "repetition"}))
NO_TOKEN = -1  # is drawn where the logits have a NaN or +inf, or nothing but -inf


@dataclass
class DeviceState:
    """What stays on the device between steps; each step donates it and gets it back."""

    kv_pages: jax.Array
    slots: SlotState


class Drawn(NamedTuple):
    """What a step has for each of its sequences. The log-probabilities are there if any of them asked."""

    tokens: Int[Array, " N"]
    logprobs: TokenLogprobs


class _Programs:
    """What both ways share."""

    def __init__(
        self,
        model: Model,
        state: DeviceState,
        *,
        num_pages: int,
        mesh: Mesh,
        rules: ShardingRules,
        dtype,
        max_logprobs: int,
        attention_backend: str = "auto",
        tuned: Table | None = None,
        processors: Sequence[LogitsProcessor] = (),
        cache: ExecutableCache | None = None,
    ):
        self.config: ModelConfig = model.config
        self.mesh, self.whole = mesh, NamedSharding(mesh, PartitionSpec())
        self.pages_sharding = state.kv_pages.sharding
        self.num_logprobs = min(max_logprobs, model.config.vocab_size)
        self._dtype, self._cache = dtype, cache
        self._attend = partial(paged_attend, num_pages=num_pages, mesh=mesh, rules=rules, backend=attention_backend, tuned=tuned)
        self.abstract_state = _abstract((state.kv_pages, state.slots))
        self._processors = tuple(processors)
        self._heads: dict[int, Future] = {}
        self._lock = threading.Lock()

    def _buffer(self, layout: BatchLayout) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=self.whole)

    def _shape(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

    def _compile(self, name: str, function, arguments: tuple, *, donate: tuple[int, ...] = (), shardings: Any = None):
        def compile_():
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=self.whole if shardings is None else shardings)
            with jax.set_mesh(self.mesh):
                return jitted.lower(*arguments).compile()

        return compile_() if self._cache is None else self._cache.get(name, compile_)

    def compile_head(self, sequences: int):
        """The program that draws for so many sequences; buckets are compiled side by side, and the first that needs it makes it."""
        with self._lock:
            mine = sequences not in self._heads
            future = self._heads.setdefault(sequences, Future())
        if mine:
            drawn_from = step_layout(Bucket(1, sequences), 1).fields  # tokens and pages are the layers' alone
            batch = {name: self._shape(*drawn_from[name][1], dtype=drawn_from[name][2]) for name in _HEAD}
            arguments = (_abstract(self.weights), self._hidden(sequences), batch, self.abstract_state[1])
            try:
                future.set_result(self._compile(f"head {sequences}", self._last, arguments, donate=(3,)))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _last(self, weights, hidden, batch, slots):
        decoder = self._decoder(weights)
        return self._draw(decoder, self._normed(decoder, hidden), batch, slots)

    def _draw(self, decoder, hidden: jax.Array, batch: dict[str, jax.Array], slots: SlotState) -> tuple[Drawn, SlotState]:
        """A token for each sequence from its last hidden state [N, D], and the slots with the token in them."""
        raw = decoder.logits(hidden)
        logits = process_logits(raw, batch, slots, self._processors)
        tokens = sample(logits, SamplingArrays(*(batch[name] for name in SamplingArrays._fields)))
        tokens = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, NO_TOKEN)
        k = self.num_logprobs
        asked = jnp.any(batch["features"] & LOGPROBS > 0)
        logprobs = jax.lax.cond(asked, lambda: token_logprobs(raw, tokens, k), lambda: no_logprobs(len(raw), k))
        slots = slots._replace(
            last_tokens=slots.last_tokens.at[batch["slots"]].set(tokens, mode="drop"),
            history=slots.history.at[batch["slots"], batch["position"]].set(tokens, mode="drop"),
        )
        return Drawn(tokens, logprobs), slots

    # Prompt logprobs: from a block of a step's hidden states at a time.

    def compile_block(self, tokens: int):
        """For steps of so many tokens: (hidden, first) -> PROMPT_BLOCK of their rows."""

        def block(hidden, first):
            padded = jnp.pad(hidden, ((0, PROMPT_BLOCK), (0, 0)))
            return jax.lax.dynamic_slice_in_dim(padded, first, PROMPT_BLOCK)

        return self._compile(f"block of {tokens}", block, (self._hidden(tokens), self._shape()))

    def compile_prompt_logprobs(self):
        """(weights, a block of hidden states, the tokens that came next) -> TokenLogprobs."""

        def logprobs(weights, hidden, tokens):
            decoder = self._decoder(weights)
            return token_logprobs(decoder.logits(self._normed(decoder, hidden)), tokens, self.num_logprobs)

        return self._compile("prompt logprobs", logprobs, (_abstract(self.weights), self._hidden(PROMPT_BLOCK), self._shape(PROMPT_BLOCK)))

    def prompt_logprobs(self, program, hidden: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        return program(self.weights, hidden, tokens)

    def compile_pool(self):
        """(weights, a block of hidden states, weights of its rows) -> the sum of their normed states [D], float32."""

        def pool(weights, hidden, rows):
            decoder = self._decoder(weights)
            states = self._normed(decoder, hidden)
            if decoder.project_out is not None:
                states = decoder.project_out(states)
            return jnp.where(rows[:, None] > 0, states.astype(jnp.float32), 0).sum(0)  # rows that are not meant may hold anything

        arguments = (_abstract(self.weights), self._hidden(PROMPT_BLOCK), self._shape(PROMPT_BLOCK, dtype=jnp.float32))
        return self._compile("pool", pool, arguments)

    def pool(self, program, hidden: jax.Array, rows: jax.Array) -> jax.Array:
        return program(self.weights, hidden, rows)

    def _hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        return self._shape(tokens, self.config.hidden_size, dtype=self._dtype)

    def _decoder(self, weights):
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))


class WholeStep(_Programs):
    """A program a bucket for all layers, and one that draws tokens for each number of sequences."""

    def __init__(self, model: Model, state: DeviceState, **options: Any):
        super().__init__(model, state, **options)
        self._graph = model.graph
        self.weights, self._tree = jax.tree.flatten(model.params)

    @property
    def all_weights(self) -> list[jax.Array]:
        return self.weights

    def compile(self, bucket: Bucket, layout: BatchLayout):
        return self.compile_layers(bucket, layout), self.compile_head(bucket.sequences)

    def compile_layers(self, bucket: Bucket, layout: BatchLayout):
        kv_pages, slots = self.abstract_state
        arguments = (_abstract(self.weights), kv_pages, slots.last_tokens, self._buffer(layout))
        shardings = (self.whole, self.whole, self.pages_sharding, self.whole)
        return self._compile(f"step {bucket}", partial(self._step, layout, bucket.decode), arguments, donate=(1,), shardings=shardings)

    def run(self, program, state: DeviceState, buffer: jax.Array, before_draw: Callable[[], None] | None = None) -> tuple[Drawn, jax.Array]:
        """Starts a step: what it draws, and its hidden states [T, D]. `before_draw` may still change the slots."""
        layers, head = program
        last, batch, state.kv_pages, hidden = layers(self.weights, state.kv_pages, state.slots.last_tokens, buffer)
        if before_draw is not None:
            before_draw()
        drawn, state.slots = head(self.weights, last, batch, state.slots)
        return drawn, hidden

    def _step(self, layout: BatchLayout, decode_only: bool, weights, kv_pages, last_tokens, buffer):
        batch, decoder = layout.unpack(buffer), self._decoder(weights)
        attend = self._attend(*(batch[name] for name in _ATTEND), decode_only=decode_only)
        tokens = _input_tokens(batch, last_tokens)
        hidden, kv_pages = decoder(tokens, batch["positions"], attend, kv_pages, rope_lengths=batch["rope_lengths"])
        return hidden[_last_rows(batch)], {name: batch[name] for name in _HEAD}, kv_pages, hidden

    def _normed(self, decoder, hidden):
        return hidden  # a whole step's are already


class LayerByLayer(_Programs):
    """A first program and a last one a bucket, one for each kind of layer, and one that draws tokens for each number of sequences."""

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
        self.weights, self._tree = jax.tree.flatten(ends)

    @property
    def all_weights(self) -> list[jax.Array]:
        return self.weights + [leaf for _, _, _, leaves, _ in self._layers for leaf in leaves]

    def compile(self, bucket: Bucket, layout: BatchLayout):
        return *self.compile_layers(bucket, layout), self.compile_head(bucket.sequences)

    def compile_layers(self, bucket: Bucket, layout: BatchLayout):
        """The first program, that of each kind of layer, and the last."""
        kv_pages, slots = self.abstract_state
        weights = _abstract(self.weights)
        first = self._compile(f"first {bucket}", partial(self._first, layout), (weights, slots.last_tokens, self._buffer(layout)))
        x, ropes, batch = jax.tree.map(lambda x: self._shape(*x.shape, dtype=x.dtype), first.out_info)
        attend = {name: batch[name] for name in _ATTEND}
        layers = {}
        for kind, graph, tree, leaves, number in self._layers:
            if kind not in layers:
                arguments = (_abstract(leaves), x, kv_pages, ropes, attend, _abstract(number))
                function = partial(self._layer, graph, tree, bucket.decode)
                shardings = (self.whole, self.pages_sharding)
                layers[kind] = self._compile(f"layer {kind} {bucket}", function, arguments, donate=(1, 2), shardings=shardings)
        last_rows = lambda x, starts: x[_last_rows({"query_starts": starts})]
        rows = self._compile(f"rows {bucket}", last_rows, (x, batch["query_starts"]))
        return first, layers, rows

    def run(self, program, state: DeviceState, buffer: jax.Array, before_draw: Callable[[], None] | None = None) -> tuple[Drawn, jax.Array]:
        """Starts a step: what it draws, and its hidden states [T, D]. `before_draw` may still change the slots."""
        first, layers, rows, head = program
        x, ropes, batch = first(self.weights, state.slots.last_tokens, buffer)
        attend = {name: batch[name] for name in _ATTEND}
        for kind, _, _, weights, number in self._layers:
            x, state.kv_pages = layers[kind](weights, x, state.kv_pages, ropes, attend, number)
        last = rows(x, batch["query_starts"])
        if before_draw is not None:
            before_draw()
        drawn, state.slots = head(self.weights, last, {name: batch[name] for name in _HEAD}, state.slots)
        return drawn, x

    def _first(self, layout: BatchLayout, weights, last_tokens, buffer):
        batch, decoder = layout.unpack(buffer), self._decoder(weights)
        x = decoder.embed(_input_tokens(batch, last_tokens), batch["positions"])
        return x, decoder.rope_tables(batch["positions"], batch["rope_lengths"]), batch

    def _layer(self, graph, tree, decode_only: bool, weights, x, kv_pages, ropes, attend, number):
        layer = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        attend = self._attend(*(attend[name] for name in _ATTEND), decode_only=decode_only)
        return layer(x, ropes, attend, kv_pages, number)

    def _normed(self, decoder, hidden):
        return decoder.final_norm(hidden)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _input_tokens(batch: dict[str, jax.Array], last_tokens: jax.Array) -> jax.Array:
    """The tokens that the host named, and for those that it has not read yet, what was drawn last in their slot."""
    return jnp.where(batch["tokens"] < 0, last_tokens[batch["token_slots"]], batch["tokens"])


def _last_rows(batch: dict[str, jax.Array]) -> jax.Array:
    """The row of each sequence's last token."""
    return jnp.maximum(batch["query_starts"][1:] - 1, 0)
