"""What a request does to its logits before a token is drawn, in vLLM's order: allowed tokens, bad words, min_tokens and
logit_bias, the engine's logits processors, penalties. Each part runs only if a row of the batch asks for it."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.errors import ConfigError
from jaxllm.serving.slot_state import ALLOWED, BAD_WORDS, BIAS, PENALTIES, SlotState

LogitsProcessor = Callable[[Float[Array, " V"], Int[Array, " L"], Int[Array, ""]], Float[Array, " V"]]
"""(logits, the sequence's tokens so far by position, how many there are) -> logits."""


def process_logits(
    logits: Float[Array, "N V"], batch: dict[str, Array], slots: SlotState, processors: tuple[LogitsProcessor, ...] = ()
) -> Float[Array, "N V"]:
    """`batch` has for each row: `slots`, `features`, `processor` (0: none, i: the i-th), `position` of the token that is drawn,
    `num_prompt`, and the three penalties."""
    rows = jnp.minimum(batch["slots"], slots.history.shape[0] - 1)
    position, num_prompt, features = batch["position"], batch["num_prompt"], batch["features"]
    tokens = lambda: slots.history[rows]

    def where_asked(logits, asked, change):
        changed = lambda: jnp.where(asked[:, None], change(logits), logits)
        return jax.lax.cond(jnp.any(asked), changed, lambda: logits)

    def penalise(logits):
        return apply_penalties(logits, tokens(), position, num_prompt, batch["presence"], batch["frequency"], batch["repetition"])

    logits = where_asked(logits, features & ALLOWED > 0, lambda x: keep_allowed(x, slots.allowed[rows]))
    logits = where_asked(logits, features & BAD_WORDS > 0, lambda x: ban_words(x, slots.bad_words[rows], tokens(), position, num_prompt))
    logits = where_asked(logits, features & BIAS > 0, lambda x: add_bias(x, slots, rows, position))
    for i, processor in enumerate(processors):
        apply = lambda x, processor=processor: jax.vmap(processor)(x, tokens(), position).astype(jnp.float32)
        logits = where_asked(logits, batch["processor"] == i + 1, apply)
    return where_asked(logits, features & PENALTIES > 0, penalise)


def check_processors(processors: Mapping[str, LogitsProcessor], vocab_size: int, max_model_len: int) -> None:
    """Raises ConfigError, naming the first that is no LogitsProcessor. Traces each, computes nothing."""
    shape = jax.ShapeDtypeStruct
    arguments = shape((vocab_size,), jnp.float32), shape((max_model_len,), jnp.int32), shape((), jnp.int32)
    for name, processor in processors.items():
        where = f"logits_processors: {name!r}"
        if not isinstance(name, str) or not callable(processor):
            raise ConfigError(f"{where} must be a function in JAX of (logits, tokens, count), under a name, not {processor!r:.100}")
        try:
            out = jax.eval_shape(processor, *arguments)
        except Exception as error:
            raise ConfigError(f"{where} cannot be traced by JAX with (logits, tokens, count): {error}") from error
        if getattr(out, "shape", None) != (vocab_size,):
            what = list(out.shape) if hasattr(out, "shape") else type(out).__name__
            raise ConfigError(f"{where} must return logits of shape [{vocab_size}], not {what}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise ConfigError(f"{where} must return floating-point logits, not {out.dtype}")


def keep_allowed(logits: Float[Array, "N V"], allowed: Array) -> Float[Array, "N V"]:
    """Only tokens whose bit is set in `allowed` uint32 [N, V/32] may be drawn."""
    vocab = logits.shape[1]
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, :vocab] > 0, logits, -jnp.inf)


def ban_words(logits: Float[Array, "N V"], words: Int[Array, "N W T"], tokens: Int[Array, "N L"], position, num_prompt):
    """A word's last token may not be drawn where the outputs end with the tokens before it."""
    before = words.shape[2] - 1
    places = position[:, None] - before + jnp.arange(before)
    tail = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
    tail = jnp.where(places >= num_prompt[:, None], tail, -2)  # no word has this token
    begun = jnp.all((words[..., :-1] < 0) | (words[..., :-1] == tail[:, None]), axis=-1)
    banned = jnp.where(begun & (words[..., -1] >= 0), words[..., -1], logits.shape[1])
    return _each_row(lambda row, ids: row.at[ids].set(-jnp.inf, mode="drop"), logits, banned)


def add_bias(logits: Float[Array, "N V"], slots: SlotState, rows: Int[Array, " N"], position: Int[Array, " N"]):
    """logit_bias, and min_tokens by way of it."""
    values = jnp.where(position[:, None] < slots.bias_until[rows], slots.bias_values[rows], 0.0)
    return _each_row(lambda row, ids, values: row.at[ids].add(values, mode="drop"), logits, slots.bias_ids[rows], values)


def apply_penalties(logits, tokens, position, num_prompt, presence, frequency, repetition):
    """vLLM's penalties (`apply_all_penalties`): repetition (Keskar et al., arXiv 1909.05858) for tokens of prompt and outputs,
    frequency and presence (OpenAI's) for those of the outputs. `tokens` [N, L] count up to `position` [N]."""
    vocab, index = logits.shape[1], jnp.arange(tokens.shape[1])

    def count(tokens, position, num_prompt):
        ids = jnp.where(index < position, tokens, vocab)
        counts = jnp.zeros(vocab, jnp.int32).at[ids].add((index >= num_prompt).astype(jnp.int32), mode="drop")
        return counts, jnp.zeros(vocab, bool).at[ids].set(True, mode="drop")

    counts, seen = _each_row(count, tokens, position, num_prompt)
    factor = jnp.where(seen, repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def _each_row(change: Callable, *arrays: Array):
    """change(a row of each), one after the other: one scatter over all rows sorts all their indices, which takes TPU's compiler
    four to eight times as long."""
    return jax.lax.map(lambda rows: change(*rows), arrays)
