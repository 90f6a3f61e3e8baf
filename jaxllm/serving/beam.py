"""Beam search, as vLLM defines it (`vllm/entrypoints/generate/beam_search`).

At each step every live beam is continued by each of the 2 * beam_width likeliest tokens. Those that end the text are finished and
kept; of the others, the beam_width best live on. Beams are scored by the sum of their tokens' log-probabilities, divided by the
length of prompt and output (without the end of sequence) to the power of length_penalty. After max_tokens the best of all are the
result. In the engine each live beam is a sequence that draws once, and the next beams are its forks.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from jaxllm.errors import RequestError
from jaxllm.serving.request import FinishReason, Logprob, Request, SamplingParams


@dataclass(frozen=True)
class BeamSearchParams:
    """For `LLM.beam_search`; named as vLLM's.

    Attributes:
      beam_width: beams that live at a time, and sequences that come back.
      max_tokens: tokens to generate at most.
      ignore_eos: go on after the end of sequence.
      temperature: 0; nothing is drawn at random.
      length_penalty: above 0 favours long texts, below 0 short ones; 0: the sum alone counts.
      skip_special_tokens: leave special tokens out of the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    skip_special_tokens: bool = True

    def __post_init__(self):
        self.sampling_params()  # which refuses what is wrong

    def sampling_params(self) -> SamplingParams:
        if isinstance(self.beam_width, bool) or not isinstance(self.beam_width, int) or self.beam_width < 1:
            raise RequestError(f"beam_width must be a whole number of at least 1, not {self.beam_width!r}")
        if self.temperature != 0:
            raise RequestError(f"temperature must be 0 for beam search, which draws nothing at random, not {self.temperature!r}")
        return SamplingParams(
            use_beam_search=True,
            beam_width=self.beam_width,
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=0,
            length_penalty=self.length_penalty,
            skip_special_tokens=self.skip_special_tokens,
        )


@dataclass
class BeamSearchSequence:
    """One result: `tokens` and `text` are prompt and output."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The results for a prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class Beam:
    """A text that may be among the results. `source`: the scheduler's number of the sequence that computed all but its last token."""

    token_ids: list[int] = field(default_factory=list)  # generated
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # at each place: of the likeliest tokens
    cumulative_logprob: float = 0.0
    source: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


class BeamSearch:
    """The search of one request for `n` texts. `ends`: tokens that end a text; `eos`: those that are no part of its length."""

    def __init__(
        self, width: int, max_tokens: int, length_penalty: float, *, num_prompt: int, ends: Collection[int], eos: Collection[int], n: int
    ):
        self.live, self.finished = [Beam()], []
        self._width, self._max_tokens, self._penalty, self._n = width, max_tokens, length_penalty, n
        self._num_prompt, self._ends, self._eos = num_prompt, ends, eos
        self._results: dict[int, tuple[int, dict[int, Logprob]]] = {}

    def add(self, beam: int, source: int, logprobs: dict[int, Logprob]) -> bool:
        """The likeliest tokens after a live beam, which sequence `source` has computed. True: those after all of them are there."""
        self._results[beam] = source, logprobs
        return len(self._results) == len(self.live)

    @property
    def over(self) -> bool:
        return not self.live or len(self.live[0].token_ids) >= self._max_tokens

    def advance(self) -> None:
        """From one step to the next, when `add` has said that all is there."""
        candidates = []
        for i, beam in enumerate(self.live):
            source, logprobs = self._results[i]
            for token, of in logprobs.items():
                new = (beam.cumulative_logprob + of.logprob, token, beam, source, logprobs)
                if token in self._ends:
                    self.finished.append(self._beam(*new, finish_reason="stop", stop_reason=None if token in self._eos else token))
                else:
                    candidates.append((self._score(new[0], len(beam.token_ids) + 1, token), new))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        self.live = [self._beam(*new) for _, new in candidates[: self._width]]
        self._results.clear()

    def best(self) -> list[Beam]:
        """The n best, those that reached max_tokens included."""
        for beam in self.live:
            beam.finish_reason = "length"
        score = lambda beam: self._score(beam.cumulative_logprob, len(beam.token_ids), beam.token_ids[-1])
        return sorted(self.finished + self.live, key=score, reverse=True)[: self._n]

    def _beam(self, cumulative: float, token: int, beam: Beam, source: int, logprobs: dict[int, Logprob], **end) -> Beam:
        return Beam([*beam.token_ids, token], [*beam.logprobs, logprobs], cumulative, source, **end)

    def _score(self, cumulative: float, num_tokens: int, last: int) -> float:
        length = self._num_prompt + num_tokens - (last in self._eos)
        return cumulative / max(length, 1) ** self._penalty


def start_beams(request: Request, eos: Collection[int], max_logprobs: int) -> tuple[BeamSearch, SamplingParams]:
    """A request's search, and the sampling parameters of each of its steps. Raises RequestError."""
    params = request.params
    width = params.beam_width or params.n
    if 2 * width > max_logprobs:
        raise RequestError(
            f"beam_width={width} needs the {2 * width} likeliest tokens of each step, and max_logprobs={max_logprobs}: "
            "make an engine with more, or lower beam_width"
        )
    num_prompt, ends = len(request.prompt_token_ids), request.stop_token_ids
    search = BeamSearch(width, request.max_tokens, params.length_penalty, num_prompt=num_prompt, ends=ends, eos=eos, n=params.n)
    # To the device each of its sequences is a greedy one, with log-probabilities.
    return search, params.replace(use_beam_search=False, beam_width=None, length_penalty=1.0, n=1, logprobs=2 * width)
