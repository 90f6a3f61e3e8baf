"""The closed set of shapes, and the arrays of a step packed into one transfer."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a step: how many tokens and how many sequences it has room for; `decode`: one token a sequence."""

    tokens: int
    sequences: int
    decode: bool = False


def powers_of_two(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and last itself."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int, *, one_row: bool, smallest: int = 16) -> list[Bucket]:
    """Every shape that a step can have: decode steps (a token a sequence), and mixed ones. Few rows cost hardly less than eight,
    as it is reading the weights that takes the time, so there is nothing between the smallest and that.

    `one_row`: there may be a shape of one row. A product of a matrix with one row adds in another order than one with two or
    any other number of rows, so where a sequence could meet both, there is none: its tokens would depend on its company.
    """
    least = 1 if one_row else 2
    most = max(least, max_num_seqs)
    decode = [Bucket(n, n, True) for n in sorted({least, *powers_of_two(min(8, most), most)})]
    first = max(least, min(smallest, max_num_batched_tokens))
    last = max(first, max_num_batched_tokens)
    mixed = [Bucket(t, min(t, most)) for t in sorted({first, *powers_of_two(min(4 * first, last), last)})]
    return sorted(decode + mixed)


def pick_bucket(buckets: list[Bucket], tokens: int, sequences: int, decode: bool) -> Bucket:
    """The smallest bucket that fits a step; `decode`: each of its sequences has one token."""
    return next(b for b in buckets if b.tokens >= tokens and b.sequences >= sequences and b.decode == decode)


class BatchLayout:
    """Named int32, uint32 and float32 arrays laid end to end in one int32 buffer, so that a step costs one transfer."""

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], np.dtype]]):
        self.fields, self.size = {}, 0
        for name, (shape, dtype) in fields.items():
            self.fields[name] = (self.size, shape, np.dtype(dtype))
            self.size += math.prod(shape)

    def new(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A zeroed buffer, and views of it by name to write into."""
        buffer = np.zeros(self.size, np.int32)
        views = {n: buffer[start : start + math.prod(shape)].view(dtype).reshape(shape) for n, (start, shape, dtype) in self.fields.items()}
        return buffer, views

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The arrays, on the device."""
        out = {}
        for name, (start, shape, dtype) in self.fields.items():
            flat = jax.lax.slice_in_dim(buffer, start, start + math.prod(shape))
            out[name] = jax.lax.bitcast_convert_type(flat, jnp.dtype(dtype)).reshape(shape)
        return out


def step_layout(bucket: Bucket, max_pages: int) -> BatchLayout:
    """What a step is told. Rows past the last token and sequence are padding."""
    t, n, i32, f32 = bucket.tokens, bucket.sequences, np.int32, np.float32
    return BatchLayout(
        {
            "tokens": ((t,), i32),  # -1: the last token of its sequence, which only the device knows yet
            "positions": ((t,), i32),
            "rope_lengths": ((t,), i32),
            "token_slots": ((t,), i32),  # the sequence's row in the table of last tokens
            "page_table": ((n, max_pages), i32),
            "kv_lens": ((n,), i32),
            "query_starts": ((n + 1,), i32),
            "counts": ((2,), i32),
            "slots": ((n,), i32),  # where the drawn token goes; past the end: nowhere
            "temperature": ((n,), f32),
            "top_k": ((n,), i32),
            "top_p": ((n,), f32),
            "min_p": ((n,), f32),
            "typical_p": ((n,), f32),
            "seed": ((n, 2), np.uint32),
            "position": ((n,), i32),  # of the token that is drawn
            "num_prompt": ((n,), i32),
            "features": ((n,), i32),  # bits of `slot_state.features`
            "processor": ((n,), i32),  # 0: none; i: the i-th logits processor
            "presence": ((n,), f32),
            "frequency": ((n,), f32),
            "repetition": ((n,), f32),
        }
    )
