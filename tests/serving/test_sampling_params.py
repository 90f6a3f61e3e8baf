"""The table of sampling parameters, and all that is made from it."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxllm import SamplingParams
from jaxllm.errors import RequestError
from jaxllm.serving.sampling_params import PARAMETERS, markdown, sampling_schema

NAMES = [parameter.name for parameter in PARAMETERS]
ROOT = Path(__file__).parents[2]

# For each parameter: values that are taken, and values that are not. All are JSON.
VALUES = {
    "max_tokens": ([1, 10**9, None], [0, -1]),
    "temperature": ([0, 0.0, 1e-5, 2], [-0.1, None]),
    "top_k": ([-1, 0, 1, 10**9], [-2, None]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, -0.5, 1.01, None]),
    "min_p": ([0, 0.5, 1], [-0.01, 1.01, None]),
    "typical_p": ([1e-9, 0.5, 1], [0, 1.01, None]),
    "presence_penalty": ([-2, 0, 2.0], [-2.01, 2.01, None]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.01, 2.01, None]),
    "repetition_penalty": ([0.01, 1, 5], [0, -1, None]),
    "logit_bias": (
        [None, {}, {"0": -100, "17": 100.0}],
        [{"x": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"1": "1"}, {"1": None}, {"1": True}, {"1": 100.5}, [[1, 1]]],
    ),
    "allowed_token_ids": ([None, [0], [5, 5, 2]], [[], [-1], ["1"], [1.5], [True], [None], [[1]]]),
    "bad_words": ([None, [], ["a", " b c"]], [[""], [5], [None], [["a"]]]),
    "min_tokens": ([0, 1, 16], [-1, None]),
    "seed": ([None, 0, 2**64 - 1], [-1, 2**64]),
    "stop": ([None, [], "a", ["a", "b"]], ["", [""], [5], [None]]),
    "stop_token_ids": ([None, [], [0, 7]], [[-1], ["1"], [1.5], [True]]),
    "include_stop_str_in_output": ([True, False], [None]),
    "ignore_eos": ([True, False], [None]),
    "skip_special_tokens": ([True, False], [None]),
    "logprobs": ([None, 0, 20], [-1]),
    "prompt_logprobs": ([None, 0, 20], [-1]),
    "n": ([1, 16384], [0, -1, 16385, None]),
    "priority": ([0, -5, 2**31 - 1, -(2**31)], [2**31, -(2**31) - 1, None]),
    "truncate_prompt_tokens": ([None, 1, -1], [0, -2]),
    "use_beam_search": ([False], [None]),  # True needs temperature 0
    "beam_width": ([None], [0, -1]),  # the others need beams
    "length_penalty": ([1, 1.0], [None]),
    "logits_processor": ([None, "name"], []),
    "structured_outputs": ([None, {"regex": "a"}, {"json": {}}, {"choice": ["a"]}], [{}, {"regex": 1}, {"choice": []}, {"rgx": "a"}]),
}
NUMBERS = [p.name for p in PARAMETERS if p.schema.get("type") in ("number", "integer", ["integer", "null"])]
# Values of no use to most: those that a parameter does not take by its type.
WRONG_TYPES = {
    "number": ["1", [1], {"a": 1}, True],
    "integer": ["1", [1], {"a": 1}, True, 1.5],
    "boolean": ["true", 1, 0, [True], {}],
    "array": ["1", 1, {"a": 1}, True, 1.5],
    "string": [1, ["a"], {}, True, 1.5],
    "object": ["1", 1, [1], True, 1.5],
}


def wrong_types(schema):
    """Values whose type the schema does not name."""
    kinds = {k for s in schema.get("anyOf", [schema]) for k in ([s["type"]] if isinstance(s["type"], str) else s["type"])} - {"null"}
    wrong = [WRONG_TYPES[kind] for kind in kinds]
    return [value for value in wrong[0] if all(any(value is w or value == w for w in others) for others in wrong)]


def test_the_table_is_complete():
    fields = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    assert fields == {p.name: p.default for p in PARAMETERS} and list(fields) == NAMES == list(VALUES)
    assert all(p.doc.endswith(".") and p.must and p.where in ("device", "scheduler", "text", "prompt", "request") for p in PARAMETERS)
    assert list(inspect.signature(SamplingParams).parameters) == NAMES  # what an editor shows


@pytest.mark.parametrize("parameter", PARAMETERS, ids=NAMES)
def test_each_takes_its_range_and_refuses_the_rest_by_name(parameter):
    schema = sampling_schema()
    validator = jsonschema.Draft202012Validator(schema)
    good, bad = VALUES[parameter.name]
    for value in [*good, parameter.default]:
        SamplingParams(**{parameter.name: value})
        assert validator.is_valid({parameter.name: value}), value
    wrong = wrong_types(parameter.schema)
    assert wrong
    for value in [*bad, *wrong]:
        with pytest.raises(RequestError, match=f"^{parameter.name} must be ") as error:
            SamplingParams(**{parameter.name: value})
        assert parameter.must in str(error.value) and repr(value) in str(error.value)
        if (parameter.name, value) != ("truncate_prompt_tokens", 0):  # a hole in its range that the schema does not show
            assert not validator.is_valid({parameter.name: value}), value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e39])
def test_no_number_is_infinite_or_none_at_all(name, value):
    counts = ("max_tokens", "top_k", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
    if isinstance(value, int) and value > 0 and name in counts:  # the engine knows how many there can be
        SamplingParams(**{name: value})
    elif (name, value) != ("min_tokens", 10**400):  # more than max_tokens, which is another error
        with pytest.raises(RequestError, match=f"^({name} must be|beam_width is for beam search)"):
            SamplingParams(**{name: value})


def test_the_schema_is_one_and_describes_all():
    schema = sampling_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == NAMES and schema["additionalProperties"] is False
    assert all(p["description"] for p in schema["properties"].values())
    jsonschema.validate({p.name: p.default for p in PARAMETERS}, schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid({"temprature": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("0123x", max_size=2), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=600)
@given(name=st.sampled_from(NAMES), value=JSON)
def test_what_the_schema_takes_is_taken(name, value):
    """And what it refuses is refused, one parameter at a time."""
    assume((name, value) not in (("truncate_prompt_tokens", 0), ("use_beam_search", True)))
    # JSON schema calls 1.0 an integer; in Python it is none.
    assume(not (isinstance(value, float) and value.is_integer()) and "." not in repr(value))
    valid = jsonschema.Draft202012Validator(sampling_schema()).is_valid({name: value})
    try:
        SamplingParams(**{name: value})
    except RequestError as error:
        assert not valid or re.match(f"min_tokens=|{name} is for beam search", str(error)), str(error)
    else:
        assert valid


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "sampling.md").read_text() == markdown(), "run make docs"
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES) and all(row.count(" | ") == 4 for row in rows)


TOGETHER = {
    "min over max": (dict(min_tokens=17), "min_tokens=17 exceeds max_tokens=16"),
    "beams at random": (dict(use_beam_search=True), "use_beam_search draws nothing at random: set temperature=0, not 1.0"),
    "beam width alone": (dict(beam_width=4), "beam_width is for beam search"),
    "length penalty alone": (dict(length_penalty=0.5), "length_penalty is for beam search"),
    "more results than beams": (dict(use_beam_search=True, temperature=0, beam_width=2, n=3), "n=3 exceeds beam_width=2"),
    "the same many times": (dict(n=2, temperature=0), "n must be 1 with temperature=0"),
    **{
        f"beams with {name}": (dict(use_beam_search=True, temperature=0) | {name: value}, f"{name} does not go together with use_beam")
        for name, value in dict(
            top_k=5,
            top_p=0.5,
            min_p=0.1,
            typical_p=0.5,
            presence_penalty=1,
            frequency_penalty=1,
            repetition_penalty=2,
            logit_bias={1: 1},
            allowed_token_ids=[1],
            bad_words=["a"],
            min_tokens=1,
            seed=1,
            stop="a",
            include_stop_str_in_output=True,
            logprobs=1,
            prompt_logprobs=1,
            logits_processor="x",
            structured_outputs={"regex": "a"},
        ).items()
    },
}


@pytest.mark.parametrize("case", TOGETHER)
def test_what_does_not_go_together(case):
    values, message = TOGETHER[case]
    with pytest.raises(RequestError) as error:
        SamplingParams(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "values",
    [dict(min_tokens=16), dict(min_tokens=10**6, max_tokens=None), dict(n=3, temperature=0.1)]
    + [dict(use_beam_search=True, temperature=0, n=3)]
    + [dict(use_beam_search=True, temperature=0, n=2, beam_width=5, length_penalty=-1.0, stop_token_ids=[3], ignore_eos=True, priority=2)],
)
def test_what_does(values):
    SamplingParams(**values)


def test_unknown_names():
    for wrong, near in (("temprature", "temperature"), ("topp", "top_p"), ("max_token", "max_tokens"), ("logit_biases", "logit_bias")):
        with pytest.raises(RequestError, match=f"SamplingParams: unknown parameter `{wrong}`; did you mean `{near}`"):
            SamplingParams(**{wrong: 1})


def test_values_are_kept_in_one_form():
    params = SamplingParams(logit_bias={"7": 1, 3: -2}, stop="a", bad_words=["b"], stop_token_ids=[2], allowed_token_ids=[3, 1])
    assert params.logit_bias == ((3, -2.0), (7, 1.0)) and (params.stop, params.bad_words) == (("a",), ("b",))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((2,), (3, 1))
    assert (SamplingParams().stop, SamplingParams().bad_words, SamplingParams().stop_token_ids) == ((), (), ())
    assert params.replace(seed=3) == dataclasses.replace(params, seed=3) != params  # its own values are taken again
    assert hash(params) == hash(params.replace())


def test_a_bias_given_twice():
    with pytest.raises(RequestError, match="logit_bias must be"):
        SamplingParams(logit_bias={"7": 1.0, 7: 2.0})


def test_functions_are_registered_first():
    with pytest.raises(RequestError, match="logits_processor must be a name: register the function when the engine is made"):
        SamplingParams(logits_processor=lambda logits, tokens, count: logits)
