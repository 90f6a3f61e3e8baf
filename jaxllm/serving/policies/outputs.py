"""How long outputs are, learned from those that have ended."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

_BINS_PER_OCTAVE = 4
_BINS = 20 * _BINS_PER_OCTAVE  # up to a million tokens
_EDGES = [2 ** (i / _BINS_PER_OCTAVE) for i in range(_BINS + 1)]
_MIDDLES = [(a + b) / 2 for a, b in zip(_EDGES, _EDGES[1:], strict=False)]
_PRIOR = 256.0  # tokens: before anything has ended
_FORGET = 0.999  # the weight of a sequence's length falls by so much with each further one
_RENEW = 64  # sequences that end before what is derived from them is derived anew


def _bin(tokens: float) -> int:
    return min(_BINS - 1, int(_BINS_PER_OCTAVE * log2(tokens))) if tokens > 1 else 0


_TABLE = 8192
_BIN_OF = [_bin(tokens) for tokens in range(_TABLE)]


class Lengths:
    """A histogram of outputs' lengths, newer ones counting more, and means by the length of the prompt."""

    def __init__(self):
        self._counts = [0.0] * _BINS
        self._weight = 1.0  # of the next one; it grows, rather than that all others shrink
        self._by_prompt: dict[int, tuple[float, float]] = {}  # by the prompt's octave: (ended, outputs)
        self._all = (0.0, 0.0)
        self._num_added = 0
        self._indices: list[float] = []  # of the histogram as it was when they were derived
        self._derived_at = -1

    def add(self, num_prompt: int, outputs: int) -> None:
        """A sequence has ended after so many tokens."""
        self._counts[_bin(outputs)] += self._weight
        self._weight /= _FORGET
        if self._weight > 1e9:
            self._counts = [count / self._weight for count in self._counts]
            self._weight = 1.0
        octave = num_prompt.bit_length()
        ended, total = self._by_prompt.get(octave, (0.0, 0.0))
        self._by_prompt[octave] = (_FORGET * ended + 1, _FORGET * total + outputs)
        self._all = (_FORGET * self._all[0] + 1, _FORGET * self._all[1] + outputs)
        self._num_added += 1

    @property
    def mean(self) -> float:
        """Of all."""
        return (self._all[1] + _PRIOR) / (self._all[0] + 1)

    def expected(self, num_prompt: int) -> float:
        """The mean of those whose prompts were about as long, drawn to the mean of all while they are few."""
        mean = self.mean
        ended, total = self._by_prompt.get(num_prompt.bit_length(), (0.0, 0.0))
        return (total + 20 * mean) / (ended + 20)

    def indices(self, shortness: float) -> Callable[[int], float]:
        """Gittins's index by the tokens that a sequence has drawn: how many more it takes, on average, for an ending, if it is run for
        as long as pays best (Gittins, 1979; Aalto et al., 2009). The smaller, the sooner it should run.

        An ending after x tokens counts for (mean / x) ** shortness: at 0 all alike, which is best for the mean time to completion;
        at 1 as is best for the mean of that time per token.
        """
        if self._derived_at < 0 or self._num_added >= self._derived_at + _RENEW:
            self._derive(shortness)
        indices = self._indices
        return lambda drawn: indices[_BIN_OF[drawn] if drawn < _TABLE else _bin(drawn)]

    def _derive(self, shortness: float) -> None:
        worth = [(self.mean / middle) ** shortness for middle in _MIDDLES]
        # One sequence's worth at the prior, falling slowly beyond: what nobody has done may still end.
        scale = 1 / self._weight
        counts = [count * scale + _MIDDLES[i] / _PRIOR * 2 ** (-_MIDDLES[i] / _PRIOR) / 8 + 1e-6 for i, count in enumerate(self._counts)]
        self._indices = []
        for first in range(_BINS):
            best, at, ends, spent, alive = float("inf"), _EDGES[first], 0.0, 0.0, sum(counts[first:])
            total = alive
            for i in range(first, _BINS):
                # All of bin i end in its middle; who is alive then goes on.
                spent += alive * max(_MIDDLES[i] - at, 0.5)
                at = _MIDDLES[i]
                ends += counts[i] * worth[i]
                alive -= counts[i]
                best = min(best, spent / ends)
                if alive < 0.001 * total:
                    break
            self._indices.append(best)
        self._derived_at = self._num_added
