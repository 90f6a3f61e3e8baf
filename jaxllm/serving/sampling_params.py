"""Sampling parameters: one table says of each its type, default, range and place, and the rest is made from it.

Names, defaults and ranges are vLLM's where it has them.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.config import unknown
from jaxllm.errors import RequestError
from jaxllm.serving import structured

_LARGEST = 1e38  # what float32 holds
_MOST_COMPLETIONS = 16384  # as in vLLM: each is queued at once


@dataclass(frozen=True)
class Parameter:
    """One sampling parameter. `schema` is its JSON schema; `parse` returns the value as it is kept, or raises ValueError."""

    name: str
    default: Any
    schema: dict[str, Any]
    must: str  # "... must be <this>, not ..."
    parse: Callable[[Any], Any]
    where: str  # it acts: device, scheduler, text, prompt or request
    doc: str


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST  # not NaN


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool) -> None:
    if not ok:
        raise ValueError


def _number(name, default, where, doc, *, low=None, high=None, above=None, must) -> Parameter:
    def parse(value):
        _require(
            _is_number(value) and (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        )
        return value

    limits = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return Parameter(name, default, {"type": "number"} | {k: v for k, v in limits.items() if v is not None}, must, parse, where, doc)


def _whole(name, default, where, doc, *, low=None, high=None, must, optional=False) -> Parameter:
    def parse(value):
        if not (optional and value is None):
            _require(_is_whole(value) and (low is None or value >= low) and (high is None or value <= high))
        return value

    limits = {k: v for k, v in {"minimum": low, "maximum": high}.items() if v is not None}
    kind: Any = ["integer", "null"] if optional else "integer"
    return Parameter(name, default, {"type": kind} | limits, must, parse, where, doc)


def _flag(name, where, doc, default=False) -> Parameter:
    def parse(value):
        _require(isinstance(value, bool))
        return value

    return Parameter(name, default, {"type": "boolean"}, "true or false", parse, where, doc)


def _strings(name, where, doc, *, one: bool, most: int, longest: int) -> Parameter:
    """A list of up to `most` strings, or, if `one`, a string by itself. Kept as a tuple. Each is looked for in every token's text, on the
    thread that all requests share."""

    def parse(value):
        if one and isinstance(value, str):
            value = (value,)
        _require(value is None or isinstance(value, (list, tuple)))
        _require(all(isinstance(s, str) and 0 < len(s) <= longest for s in value or ()) and len(value or ()) <= most)
        return tuple(value or ())

    string = {"type": "string", "minLength": 1, "maxLength": longest}
    array = {"type": "array", "items": string, "maxItems": most}
    forms = [string, array, {"type": "null"}] if one else [array, {"type": "null"}]
    must = f"{'a string, or ' if one else ''}a list of up to {most} strings, none of them empty or longer than {longest} characters"
    return Parameter(name, None, {"anyOf": forms}, must, parse, where, doc)


def _token_ids(name, where, doc, *, empty: bool) -> Parameter:
    """Token ids, kept as a tuple; with `empty`, none is the same as an empty list, else an empty list is refused."""

    def parse(value):
        _require(value is None or isinstance(value, (list, tuple)))
        _require(all(_is_whole(i) and i >= 0 for i in value or ()) and (empty or value is None or len(value) > 0))
        return tuple(value or ()) if empty else value if value is None else tuple(value)

    array = {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}} | ({} if empty else {"minItems": 1})
    return Parameter(name, None, array, "a list of token ids" + ("" if empty else ", at least one"), parse, where, doc)


def _logit_bias(name, where, doc) -> Parameter:
    """{token id: bias}, with ids as strings too, as JSON has them. Kept as sorted pairs."""

    def parse(value):
        if value is None:
            return None
        pairs = value.items() if isinstance(value, dict) else value
        _require(isinstance(pairs, tuple) or isinstance(value, dict))
        biases = {}
        for token, bias in pairs:
            token = int(token) if isinstance(token, str) and token.isdecimal() else token
            _require(_is_whole(token) and token >= 0 and token not in biases)
            _require(_is_number(bias) and -100 <= bias <= 100)
            biases[token] = float(bias)
        return tuple(sorted(biases.items()))

    numbers = {"type": "number", "minimum": -100, "maximum": 100}
    schema = {"type": ["object", "null"], "patternProperties": {"^[0-9]+$": numbers}, "additionalProperties": False}
    return Parameter(name, None, schema, "a dict of token ids and numbers from -100 to 100", parse, where, doc)


def _name(name, where, doc) -> Parameter:
    def parse(value):
        if callable(value):
            raise RequestError(
                f"{name} must be a name: register the function when the engine is made, LLM(..., logits_processors={{'name': function}}), "
                "so that it is compiled at start, and give its name here"
            )
        _require(value is None or isinstance(value, str))
        return value

    return Parameter(
        name, None, {"type": ["string", "null"]}, "the name of a logits processor that the engine was made with", parse, where, doc
    )


def _top_k() -> Parameter:
    must = "a whole number: 0 or -1 for all tokens, or at least 1"
    return _whole("top_k", 0, "device", "Choose among the k likeliest tokens; 0 or -1: all.", low=-1, must=must)


_WHOLE_FROM_0 = "a whole number of at least 0"
_WHOLE_FROM_1 = "a whole number of at least 1"
_PENALTY = dict(low=-2, high=2, must="between -2 and 2")
_SHARE = dict(above=0, high=1, must="above 0 and at most 1")

PARAMETERS: tuple[Parameter, ...] = (
    _whole(
        "max_tokens",
        16,
        "scheduler",
        "Tokens to generate at most; none: as many as `max_model_len` leaves.",
        low=1,
        must=_WHOLE_FROM_1,
        optional=True,
    ),
    _number("temperature", 1.0, "device", "Divides the logits; 0 is greedy.", low=0, must="0 (greedy) or above"),
    _top_k(),
    _number(
        "top_p",
        1.0,
        "device",
        "Choose among the likeliest tokens whose probabilities sum to at least this (Holtzman et al., arXiv 1904.09751).",
        **_SHARE,
    ),
    _number(
        "min_p", 0.0, "device", "Leave out tokens less likely than this fraction of the likeliest.", low=0, high=1, must="between 0 and 1"
    ),
    _number(
        "typical_p",
        1.0,
        "device",
        "Choose among the tokens whose surprise is nearest to the entropy, up to this share (Meister et al., arXiv 2202.00666).",
        **_SHARE,
    ),
    _number("presence_penalty", 0.0, "device", "Taken off the logits of tokens that the output has.", **_PENALTY),
    _number("frequency_penalty", 0.0, "device", "Taken off the logits of tokens as often as the output has them.", **_PENALTY),
    _number(
        "repetition_penalty",
        1.0,
        "device",
        "Divides the logits above 0, and multiplies those below, of tokens that prompt or output has (Keskar et al., arXiv 1909.05858).",
        low=1e-6,
        must="at least 1e-6",
    ),
    _logit_bias("logit_bias", "device", "Added to the logits of tokens, by id."),
    _token_ids("allowed_token_ids", "device", "Only these tokens may be drawn.", empty=False),
    _strings(
        "bad_words",
        "device",
        "Words that may not appear: a word's last token is not drawn after its others.",
        one=False,
        most=1024,
        longest=128,
    ),
    _whole("min_tokens", 0, "device", "No end of sequence, stop token or stop string before this many tokens.", low=0, must=_WHOLE_FROM_0),
    _whole(
        "seed",
        None,
        "device",
        "Makes this request's tokens reproducible.",
        low=0,
        high=2**64 - 1,
        must="a whole number from 0 to 2**64 - 1",
        optional=True,
    ),
    _strings("stop", "text", "Strings that end the output; they are not part of it.", one=True, most=256, longest=1000),
    _token_ids("stop_token_ids", "text", "Tokens that end the output, besides the model's own end of sequence.", empty=True),
    _flag("include_stop_str_in_output", "text", "Keep the stop string that ended the output."),
    _flag("ignore_eos", "text", "Go on after the end of sequence."),
    _flag("skip_special_tokens", "text", "Leave special tokens out of the text.", default=True),
    _whole(
        "logprobs",
        None,
        "device",
        "For each generated token, its log-probability and those of so many likeliest, by the model's own logits.",
        low=0,
        must=_WHOLE_FROM_0,
        optional=True,
    ),
    _whole(
        "prompt_logprobs",
        None,
        "device",
        "The same for each token of the prompt; it is then computed whole, whatever is cached.",
        low=0,
        must=_WHOLE_FROM_0,
        optional=True,
    ),
    _whole(
        "n",
        1,
        "scheduler",
        "Continuations of the prompt, each with a seed of its own.",
        low=1,
        high=_MOST_COMPLETIONS,
        must=f"a whole number from 1 to {_MOST_COMPLETIONS}",
    ),
    _whole(
        "priority",
        0,
        "scheduler",
        "Lower runs first, where the engine's `scheduling_policy` is `priority`.",
        low=-(2**31),
        high=2**31 - 1,
        must="a whole number of 32 bits",
    ),
    _whole(
        "truncate_prompt_tokens",
        None,
        "prompt",
        "Keep only so many last tokens of the prompt; -1: as many as `max_model_len` has room for.",
        low=-1,
        must="a whole number of at least 1, or -1",
        optional=True,
    ),
    _flag("use_beam_search", "scheduler", "Beam search instead of sampling; it needs temperature 0."),
    _whole("beam_width", None, "scheduler", "Beams that live at a time; by default n.", low=1, must=_WHOLE_FROM_1, optional=True),
    _number(
        "length_penalty",
        1.0,
        "scheduler",
        "Beams are ranked by their log-probability divided by their length to this power.",
        must="a finite number",
    ),
    _name(
        "logits_processor",
        "device",
        "The name of a function in JAX that the engine was made with (`logits_processors`), applied to the logits.",
    ),
    Parameter(
        "structured_outputs",
        None,
        structured.SCHEMA,
        "one of json (a schema), json_object, regex, choice, grammar and structural_tag",
        structured.parse,
        "device",
        'What the text must be, e.g. `{"regex": "[0-9]+"}`; the output ends where nothing more can follow. It needs llguidance.',
    ),
)
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def default(name: str) -> Any:
    return _BY_NAME[name].default


def _refuse_unknown_keywords(cls):
    """Makes the constructor refuse a keyword that it does not know with a RequestError that names the nearest one."""
    init, known = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(init)
    def __init__(self, *args, **keywords):
        if strange := [name for name in keywords if name not in known]:
            raise RequestError(f"{cls.__name__}: {unknown(strange[0], known, 'parameter')}")
        init(self, *args, **keywords)

    cls.__init__ = __init__
    return cls


@_refuse_unknown_keywords
@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when they end. `PARAMETERS` (docs/sampling.md) says what each does.

    Raises RequestError for a value out of range, or for parameters that do not go together.
    """

    max_tokens: int | None = default("max_tokens")
    temperature: float = default("temperature")
    top_k: int = default("top_k")
    top_p: float = default("top_p")
    min_p: float = default("min_p")
    typical_p: float = default("typical_p")
    presence_penalty: float = default("presence_penalty")
    frequency_penalty: float = default("frequency_penalty")
    repetition_penalty: float = default("repetition_penalty")
    logit_bias: dict[int, float] | tuple[tuple[int, float], ...] | None = default("logit_bias")
    allowed_token_ids: list[int] | tuple[int, ...] | None = default("allowed_token_ids")
    bad_words: list[str] | tuple[str, ...] | None = default("bad_words")
    min_tokens: int = default("min_tokens")
    seed: int | None = default("seed")
    stop: str | list[str] | tuple[str, ...] | None = default("stop")
    stop_token_ids: list[int] | tuple[int, ...] | None = default("stop_token_ids")
    include_stop_str_in_output: bool = default("include_stop_str_in_output")
    ignore_eos: bool = default("ignore_eos")
    skip_special_tokens: bool = default("skip_special_tokens")
    logprobs: int | None = default("logprobs")
    prompt_logprobs: int | None = default("prompt_logprobs")
    n: int = default("n")
    priority: int = default("priority")
    truncate_prompt_tokens: int | None = default("truncate_prompt_tokens")
    use_beam_search: bool = default("use_beam_search")
    beam_width: int | None = default("beam_width")
    length_penalty: float = default("length_penalty")
    logits_processor: str | None = default("logits_processor")
    structured_outputs: structured.StructuredOutputs | dict[str, Any] | None = default("structured_outputs")

    def __post_init__(self):
        for parameter in PARAMETERS:
            value = getattr(self, parameter.name)
            try:
                object.__setattr__(self, parameter.name, parameter.parse(value))
            except RequestError:
                raise
            except (ValueError, TypeError):
                raise RequestError(f"{parameter.name} must be {parameter.must}, not {value!r:.200}") from None
        if self.truncate_prompt_tokens == 0:
            raise RequestError(f"truncate_prompt_tokens must be {_BY_NAME['truncate_prompt_tokens'].must}, not 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        if self.structured_outputs is not None and self.min_tokens:
            raise RequestError("min_tokens does not go together with structured_outputs, which say where the output ends: leave one out")
        if self.use_beam_search:
            self._check_beam_search()
        elif self.beam_width is not None or self.length_penalty != default("length_penalty"):
            name = "length_penalty" if self.beam_width is None else "beam_width"
            raise RequestError(f"{name} is for beam search: set use_beam_search=True, or leave it out")
        elif self.n > 1 and self.temperature == 0:
            raise RequestError("n must be 1 with temperature=0: greedy continuations are all the same")

    def _check_beam_search(self) -> None:
        """Beams are chosen by their log-probability alone: what bends or cuts single draws has no meaning there."""
        if self.temperature != 0:
            raise RequestError(f"use_beam_search draws nothing at random: set temperature=0, not {self.temperature!r}")
        if self.n > (self.beam_width or self.n):
            raise RequestError(f"n={self.n} exceeds beam_width={self.beam_width}: there are no more beams than that")
        fine = {
            "max_tokens",
            "temperature",
            "ignore_eos",
            "skip_special_tokens",
            "n",
            "priority",
            "truncate_prompt_tokens",
            "use_beam_search",
        }
        fine |= {"beam_width", "length_penalty", "stop_token_ids"}
        unset = SamplingParams()
        for parameter in PARAMETERS:
            if parameter.name not in fine and getattr(self, parameter.name) != getattr(unset, parameter.name):
                raise RequestError(f"{parameter.name} does not go together with use_beam_search: leave one of them out")

    def replace(self, **changes) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


def sampling_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of an object of sampling parameters."""
    properties = {p.name: p.schema | {"default": p.default, "description": p.doc} for p in PARAMETERS}
    schema = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": schema, "title": "SamplingParams", "type": "object", "properties": properties, "additionalProperties": False}


def markdown() -> str:
    """docs/sampling.md."""
    rows = [f"| `{p.name}` | {'none' if p.default is None else f'`{p.default}`'} | {p.must} | {p.where} | {p.doc} |" for p in PARAMETERS]
    return "\n".join([_HEAD, "| Parameter | Default | Must be | Acts on | What it does |", "|---|---|---|---|---|", *rows, _TAIL])


_HEAD = """# Sampling parameters

Made by `make docs` from the table in `jaxllm/serving/sampling_params.py`. A parameter that is not in the table, or a value out
of its range, is refused with an error that names it.
"""
_TAIL = """
## In which order

1. Log-probabilities (`logprobs`, `prompt_logprobs`) are those of the model's own logits, before anything below.
2. `allowed_token_ids`, `bad_words`, `min_tokens` and `logit_bias`, the `logits_processor`, `repetition_penalty`, `frequency_penalty` and
   `presence_penalty`.
3. With temperature 0, the likeliest token. Else `temperature`, `min_p`, `top_k`, `top_p`, `typical_p`, and a draw whose random number
   depends on the request's seed and the token's position alone.

## What is reproducible

With a seed, or with temperature 0, a request's tokens are the same whoever shares its batch, however its prompt is cut into chunks, whether
it was preempted, and whatever of it was cached, on one machine with one configuration of the engine. In float32 on the CPU this holds by
construction, to the bit of every log-probability: sums over rows are matrix products, which add in the same order for any number of
rows from two on, and no step has fewer. (Heads of fewer than 16 values are too small for that: their tokens differ where two are
equally likely to some seven digits.) An engine for one sequence without prefix cache (`max_num_seqs=1, enable_prefix_caching=False`)
does take steps of one row, which are faster: there is nobody else there, but its tokens may differ from another engine's in the same
rare places. On other devices and in bfloat16 the random numbers are the same, and logits may differ in their last bits between shapes
of steps.
"""
