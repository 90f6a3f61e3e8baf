"""What sampling keeps on the device for each running sequence, a row ("slot") for each.

The history and the drawn token are written by every step. The other tables are written when a sequence that needs them is
admitted, by one program, from one buffer (`SlotWriter`); rows of sequences that need none hold what others left there, and the
step's `features` say that they are not to be read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from jaxllm.errors import RequestError
from jaxllm.serving.batch import BatchLayout
from jaxllm.serving.request import Completion

MAX_BIASED = 1024  # tokens of a request with a logit_bias, held back by min_tokens, or a bad word of their own
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 128, 8  # of those that are several tokens

PENALTIES, BIAS, ALLOWED, BAD_WORDS, LOGPROBS = 1, 2, 4, 8, 16  # bits of a row's `features`
_FOREVER = np.iinfo(np.int32).max


class SlotState(NamedTuple):
    """S slots, L = max_model_len, V = vocabulary."""

    last_tokens: Int[Array, " S"]  # drawn last
    history: Int[Array, "S L"]  # tokens by position
    bias_ids: Int[Array, "S B"]  # V or more: none
    bias_values: Float[Array, "S B"]
    bias_until: Int[Array, "S B"]  # added for tokens at positions below this
    allowed: UInt32[Array, "S V/32"]  # a bit for each token that may be drawn
    bad_words: Int[Array, "S W N"]  # tokens, the last of each word at the end, -1 before its first


def abstract_slots(num_slots: int, max_model_len: int, vocab_size: int, mesh: Mesh) -> SlotState:
    """Their shapes and types, all whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    table = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((num_slots, *shape), dtype, sharding=whole)
    return SlotState(
        last_tokens=table(),
        history=table(max_model_len),
        bias_ids=table(MAX_BIASED),
        bias_values=table(MAX_BIASED, dtype=jnp.float32),
        bias_until=table(MAX_BIASED),
        allowed=table(-(-vocab_size // 32), dtype=jnp.uint32),
        bad_words=table(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
    )


def make_slots(num_slots: int, max_model_len: int, vocab_size: int, mesh: Mesh) -> SlotState:
    """Zeros."""
    tables = abstract_slots(num_slots, max_model_len, vocab_size, mesh)
    make = lambda: jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), tables)
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def features(completion: Completion) -> int:
    """What sampling does to this sequence's logits, or tells of them, as bits."""
    params = completion.request.params
    return (
        PENALTIES * (params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1)
        | BIAS * bool(params.logit_bias or _held_back(completion) or any(len(word) == 1 for word in completion.request.bad_words))
        | ALLOWED * (params.allowed_token_ids is not None or completion.matcher is not None)
        | BAD_WORDS * any(len(word) > 1 for word in completion.request.bad_words)
        | LOGPROBS * (params.logprobs is not None)
    )


def needs_slot(completion: Completion) -> bool:
    """Whether the sequence reads what `SlotWriter` writes."""
    return bool(features(completion) & ~LOGPROBS) or completion.request.params.logits_processor is not None


def check_slot(completion: Completion, vocab_size: int) -> None:
    """Raises RequestError if a slot cannot hold what the request asks for, or if it leaves no token to be drawn."""
    request = completion.request
    if request.params.min_tokens > request.max_tokens:
        raise RequestError(f"min_tokens={request.params.min_tokens} exceeds the {request.max_tokens} tokens that there is room for")
    if (size := len(_biases(completion))) > MAX_BIASED:
        raise RequestError(
            f"logit_bias, bad_words of one token, and the stop tokens that min_tokens holds back name {size} tokens together, "
            f"and {MAX_BIASED} is the most: name fewer, or use allowed_token_ids, which has no limit"
        )
    words = [word for word in request.bad_words if len(word) > 1]
    if len(words) > MAX_BAD_WORDS or any(len(word) > MAX_BAD_WORD_TOKENS for word in words):
        raise RequestError(
            f"bad_words may be {MAX_BAD_WORDS} words of up to {MAX_BAD_WORD_TOKENS} tokens (each counts with and without a leading "
            f"space), and these are {len(words)} of up to {max(map(len, words))}: give fewer or shorter ones"
        )

    banned = {token for token, value, _ in _biases(completion) if value == -np.inf}
    allowed = request.params.allowed_token_ids
    if allowed is not None:  # few enough that words of several tokens may end in all of them
        banned |= {word[-1] for word in words}
    if banned.issuperset(range(vocab_size) if allowed is None else allowed):
        what = "min_tokens and bad_words leave" if allowed is None else "allowed_token_ids leaves"
        raise RequestError(f"{what} no token to draw: bad_words or min_tokens (which holds back stop tokens) forbid all; allow more")


def _held_back(completion: Completion) -> frozenset[int]:
    """Tokens that min_tokens keeps from being drawn."""
    request = completion.request
    return request.stop_token_ids if request.params.min_tokens else frozenset()


def _biases(completion: Completion) -> list[tuple[int, float, int]]:
    """(token, what is added to its logit, the position from which it no longer is)."""
    request = completion.request
    until = len(request.prompt_token_ids) + request.params.min_tokens
    return [
        *((token, value, _FOREVER) for token, value in request.params.logit_bias or ()),
        *((token, -np.inf, until) for token in sorted(_held_back(completion))),
        *((word[0], -np.inf, _FOREVER) for word in request.bad_words if len(word) == 1),
    ]


def packed(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """uint32 [V/32] with a bit for each of the tokens."""
    ids, bits = np.asarray(token_ids), np.zeros(-(-vocab_size // 32), np.uint32)
    np.bitwise_or.at(bits, ids // 32, np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32)))
    return bits


class SlotWriter:
    """One compiled program that fills a slot."""

    def __init__(self, slots: SlotState, vocab_size: int, mesh: Mesh):
        self._vocab_size, self._mesh, self._whole = vocab_size, mesh, NamedSharding(mesh, PartitionSpec())
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), slots)
        # The last tokens stay out of it: they are each step's own.
        self._layout = BatchLayout(
            {"slot": ((1,), np.int32)} | {n: (x.shape[1:], x.dtype) for n, x in slots._asdict().items() if n != "last_tokens"}
        )

    def compile(self):
        buffer = jax.ShapeDtypeStruct((self._layout.size,), jnp.int32, sharding=self._whole)
        with jax.set_mesh(self._mesh):
            return jax.jit(self._write, donate_argnums=0, out_shardings=self._whole).lower(self._abstract, buffer).compile()

    def pack(self, completion: Completion, slot: int) -> np.ndarray:
        """What the program is told."""
        buffer, row = self._layout.new()
        request = completion.request
        row["slot"][0] = slot
        tokens = completion.token_ids[: row["history"].size]
        row["history"][: len(tokens)] = tokens
        row["bias_ids"][:] = self._vocab_size
        for i, (token, value, until) in enumerate(_biases(completion)):
            row["bias_ids"][i], row["bias_values"][i], row["bias_until"][i] = token, value, until
        if request.params.allowed_token_ids is not None:
            row["allowed"] |= packed(request.params.allowed_token_ids, self._vocab_size)
        row["bad_words"][:] = -1
        for i, word in enumerate(word for word in request.bad_words if len(word) > 1):
            row["bad_words"][i, -len(word) :] = word
        return buffer

    def run(self, program, slots: SlotState, buffer: np.ndarray) -> SlotState:
        """The slots with one filled; `slots` is used up."""
        return program(slots, jax.device_put(buffer, self._whole))

    def _write(self, slots: SlotState, buffer: jax.Array) -> SlotState:
        row = self._layout.unpack(buffer)
        slot = row.pop("slot")[0]
        return slots._replace(**{name: getattr(slots, name).at[slot].set(value) for name, value in row.items()})


class MaskWriter:
    """Compiled programs that say which tokens may be drawn next, for up to so many slots at a time (`sizes`)."""

    def __init__(self, slots: SlotState, mesh: Mesh):
        self._mesh, self._whole = mesh, NamedSharding(mesh, PartitionSpec())
        self._abstract = jax.ShapeDtypeStruct(slots.allowed.shape, slots.allowed.dtype, sharding=slots.allowed.sharding)
        self._num_slots, self._words = slots.allowed.shape
        self.sizes = sorted({min(size, self._num_slots) for size in (1, 8, 64, self._num_slots)})

    def compile(self, size: int):
        """(all slots' masks, a slot and its mask in each row) -> all slots' masks."""

        def write(allowed, rows):
            return allowed.at[rows[:, 0].astype(jnp.int32)].set(rows[:, 1:], mode="drop")

        rows = jax.ShapeDtypeStruct((size, 1 + self._words), jnp.uint32, sharding=self._whole)
        with jax.set_mesh(self._mesh):
            return jax.jit(write, donate_argnums=0, out_shardings=self._whole).lower(self._abstract, rows).compile()

    def pack(self, slots: Sequence[int], masks: np.ndarray) -> np.ndarray:
        """What the program for that many is told."""
        size = next(size for size in self.sizes if size >= len(slots))
        rows = np.full((size, 1 + self._words), self._num_slots, np.uint32)  # past the end: nowhere
        rows[: len(slots), 0], rows[: len(slots), 1:] = slots, masks
        return rows

    def run(self, program, slots: SlotState, rows: np.ndarray) -> SlotState:
        """The slots with new masks; `slots` is used up."""
        return slots._replace(allowed=program(slots.allowed, jax.device_put(rows, self._whole)))
