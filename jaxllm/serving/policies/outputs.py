"""How long outputs are, learned from those that have ended."""

from __future__ import annotations

from math import log2, sqrt

import numpy as np

_BINS_PER_OCTAVE = 4
_BINS = 20 * _BINS_PER_OCTAVE  # up to a million tokens
_EDGES = [2 ** (i / _BINS_PER_OCTAVE) for i in range(_BINS + 1)]
_MIDDLES = [(a + b) / 2 for a, b in zip(_EDGES, _EDGES[1:], strict=False)]
_PRIOR = 256.0  # tokens: before anything has ended
_FORGET = 0.999  # the weight of a sequence's length falls by so much with each further one
_RENEW = 64  # sequences that end before what is derived from them is derived anew
_COMPARE = 16  # and before what prompts tell is
_MOST_DRAWN = 1e6  # sequences that what all had counts for, where prompts tell nothing


def _bin(tokens: float) -> int:
    return min(_BINS - 1, int(_BINS_PER_OCTAVE * log2(tokens))) if tokens > 1 else 0


# [from bin, to bin]: those ahead, and the tokens from the middle of the one before (of the first, from its edge) to a bin's own.
_AHEAD = np.triu(np.ones((_BINS, _BINS), bool))
_FURTHER = np.maximum(np.subtract(_MIDDLES, np.where(np.eye(_BINS, dtype=bool), _EDGES[:-1], [0.0, *_MIDDLES[:-1]])), 0.5)

_TABLE = 8192
_BIN_OF = [_bin(tokens) for tokens in range(_TABLE)]
_KIND_OF = [bin // 2 for bin in _BIN_OF]


def _kind(num_prompt: int) -> int:
    """Of prompts that are alike: of lengths within half an octave."""
    return _KIND_OF[num_prompt] if num_prompt < _TABLE else _bin(num_prompt) // 2


class _Histogram:
    """Of lengths, newer ones counting more."""

    def __init__(self):
        self.counts = [0.0] * _BINS
        self.weight = 1.0  # of the next one; it grows, rather than that all others shrink
        self.num_added = 0
        self.ended = self.total = self.squares = 0.0  # sums of 1, of lengths and of their squares

    def add(self, outputs: int) -> None:
        self.counts[_bin(outputs)] += self.weight
        self.weight /= _FORGET
        if self.weight > 1e9:
            self.counts = [count / self.weight for count in self.counts]
            self.weight = 1.0
        self.num_added += 1
        self.ended = _FORGET * self.ended + 1
        self.total = _FORGET * self.total + outputs
        self.squares = _FORGET * self.squares + outputs * outputs

    def scaled(self, factor: float) -> list[float]:
        """The counts, times a factor, as if the newest had counted for 1."""
        scale = factor / self.weight
        return [count * scale for count in self.counts]


_NOTHING = _Histogram()


class Lengths:
    """Outputs' lengths, by the length of the prompt: what those of like prompts (within half an octave) had, drawn to what all had.

    How far is by Buehlmann's credibility (1967): what all had counts for as many sequences as the variance among those of like prompts
    is times that between the prompts. Where prompts tell nothing, all are alike.
    """

    def __init__(self):
        self._all = _Histogram()
        self._like: dict[int, _Histogram] = {}
        self._within, self._drawn = _PRIOR**2, _MOST_DRAWN
        self._indices: dict[int, tuple[int, float, list[float]]] = {}  # by prompt: (when they are due anew, shortness, by bins drawn)

    def add(self, num_prompt: int, outputs: int) -> None:
        """A sequence has ended after so many tokens."""
        self._all.add(outputs)
        self._like.setdefault(_kind(num_prompt), _Histogram()).add(outputs)
        if self._all.num_added % _COMPARE == 0:
            self._compare()

    @property
    def mean(self) -> float:
        """Of all."""
        return (self._all.total + _PRIOR) / (self._all.ended + 1)

    def expected(self, num_prompt: int) -> float:
        """The mean of those of like prompts, drawn to the mean of all."""
        like, drawn = self._like.get(_kind(num_prompt), _NOTHING), self._drawn
        return (like.total + drawn * self.mean) / (like.ended + drawn)

    @property
    def spread(self) -> float:
        """The standard deviation, in tokens, of the outputs of like prompts: what cannot be known of a length beforehand."""
        return sqrt(self._within)

    def _compare(self) -> None:
        """How much prompts tell."""
        kinds = self._like.values()
        ended, total, squares = (sum(column) for column in zip(*((k.ended, k.total, k.squares) for k in kinds), strict=True))
        within = sum(max(0.0, k.squares - k.total**2 / k.ended) for k in kinds)
        self._within = (within + _PRIOR**2) / (max(0.0, ended - len(kinds)) + 1)
        between = (squares - total**2 / ended + _PRIOR**2) / ended - self._within
        self._drawn = min(_MOST_DRAWN, self._within / between) if between > 0 else _MOST_DRAWN

    def index(self, num_prompt: int, drawn: int, shortness: float) -> float:
        """Gittins's index of a sequence that has drawn so many tokens: how many more it takes, on average, for an ending, if it is run
        for as long as pays best (Gittins, 1979; Aalto et al., 2009). The smaller, the sooner it should run.

        An ending after x tokens counts for (mean / x) ** shortness: at 0 all alike, which is best for the mean time to completion;
        at 1 as is best for the mean of that time per token.
        """
        kind = _kind(num_prompt)
        due, of, indices = self._indices.get(kind, (0, -1.0, ()))
        if self._all.num_added >= due or of != shortness:
            indices = self._derive(self._like.get(kind, _NOTHING), shortness)
            self._indices[kind] = (self._all.num_added + _RENEW, shortness, indices)
        return indices[_BIN_OF[drawn] if drawn < _TABLE else _bin(drawn)]

    def _derive(self, like: _Histogram, shortness: float) -> list[float]:
        worth = [(self.mean / middle) ** shortness for middle in _MIDDLES]
        share = min(1.0, self._drawn / max(1.0, self._all.ended))
        both = zip(_MIDDLES, like.scaled(1.0), self._all.scaled(share), strict=True)
        # One sequence's worth at the prior, falling slowly beyond: what nobody has done may still end.
        counts = np.array([a + b + middle / _PRIOR * 2 ** (-middle / _PRIOR) / 8 + 1e-6 for middle, a, b in both])
        # All of bin i end in its middle; who is alive then goes on. Row: the bin of who has drawn so much; column: that it is run to.
        alive = np.cumsum(counts[::-1])[::-1]
        spent = np.cumsum(np.where(_AHEAD, alive * _FURTHER, 0.0), axis=1)
        ends = np.cumsum(np.where(_AHEAD, counts * worth, 0.0), axis=1)
        reached = _AHEAD & (alive >= 0.001 * alive[:, None])  # by hardly anyone: what few say of those beyond is not to be relied on
        return np.divide(spent, ends, out=np.full(spent.shape, np.inf), where=reached).min(axis=1).tolist()
