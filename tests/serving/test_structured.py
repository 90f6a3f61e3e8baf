"""Structured output: always what was asked for, whatever else goes on, and nobody else's tokens change."""

import json
import re

import jsonschema
import numpy as np
import pytest
from tiny_models import write_llama

from jaxllm import LLM, SamplingParams
from jaxllm.errors import RequestError
from jaxllm.serving.structured import StructuredOutputs

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"enum": ["yes", "no", 7, None]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}]},
    {"type": "string", "pattern": "^[a-f]{2,5}$"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("structured"), tokenizer=True, eos_token_id=4, vocab_size=640)


@pytest.fixture(scope="module")
def llm(folder):
    """Few pages, small steps: prompts are cut to chunks, and sequences preempted."""
    return LLM(folder, dtype="float32", max_num_seqs=8, max_num_batched_tokens=16, max_model_len=192, page_size=4, num_pages=48)


def params(seed=0, **options):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 150, "seed": seed} | options)


def json_params(schema, seed=0, **options):
    return params(seed, structured_outputs={"json": schema, "disable_any_whitespace": True}, **options)


def test_every_text_is_valid_in_company_of_others_whose_tokens_do_not_change(llm):
    """Random weights say nothing of themselves that is JSON. Plain requests among them answer as they do alone."""
    plain = [("Once upon a time there was", params(seed, max_tokens=40)) for seed in range(6)]
    alone = [llm.generate(prompt, p)[0].outputs[0].token_ids for prompt, p in plain]
    asked = [(f"Number {i} of them: {'word ' * (i % 9)}", json_params(SCHEMAS[i % len(SCHEMAS)], i)) for i in range(40)]
    mixed = asked[:20] + plain + asked[20:]
    before, preemptions = llm.engine.runner.stats.compiles_after_warmup, llm.engine.scheduler.num_preemptions
    outputs = [output.outputs[0] for output in llm.generate([prompt for prompt, _ in mixed], [p for _, p in mixed])]
    for i, output in enumerate(outputs[:20] + outputs[26:]):
        assert output.finish_reason == "stop", output
        jsonschema.validate(json.loads(output.text), SCHEMAS[i % len(SCHEMAS)])
    assert [output.token_ids for output in outputs[20:26]] == alone
    assert llm.engine.scheduler.num_preemptions > preemptions and llm.engine.runner.stats.compiles_after_warmup == before == 0
    assert llm.engine.pool.num_free == llm.engine.pool.capacity
    again = [output.outputs[0].token_ids for output in llm.generate([asked[0][0], asked[7][0]], [asked[0][1], asked[7][1]])]
    assert again == [outputs[0].token_ids, outputs[7].token_ids], "nor do theirs depend on the company"


def test_regex_choice_and_grammar(llm):
    number = params(structured_outputs=StructuredOutputs(regex=r"[1-9][0-9]{2}-[a-c]+x"))
    assert re.fullmatch(r"[1-9][0-9]{2}-[a-c]+x", llm.generate("a", number)[0].outputs[0].text)
    colours = {llm.generate("a", params(s, structured_outputs={"choice": ["red", "green", "blue"]}))[0].outputs[0].text for s in range(12)}
    assert colours <= {"red", "green", "blue"} and len(colours) > 1
    for grammar in ('start: "(" inner ")"\ninner: "a" | "b" "c"', 'root ::= "(" inner ")"\ninner ::= "a" | "bc"'):
        assert llm.generate("a", params(structured_outputs={"grammar": grammar}))[0].outputs[0].text in ("(a)", "(bc)")
    text = llm.generate("a", params(structured_outputs={"json_object": True}, max_tokens=3))[0].outputs[0]
    assert text.text.lstrip().startswith("{") and text.finish_reason == "length"


TAGS = {
    "structures": [
        {"begin": "=int(", "schema": {"type": "integer", "minimum": 0, "maximum": 99}, "end": ")"},
        {"begin": "=flag(", "schema": {"enum": [True, False]}, "end": ")"},
    ],
    "triggers": ["="],
}


def test_structural_tags(llm):
    """Any text, until a trigger comes."""
    bias = {i: 6.0 for i in llm.engine.tokenizer.encode("=", add_special_tokens=False)}
    outputs = llm.generate(
        ["a"] * 12, [params(seed, structured_outputs={"structural_tag": TAGS}, logit_bias=bias, max_tokens=60) for seed in range(12)]
    )
    texts = [output.outputs[0].text for output in outputs]
    calls = [re.split(r"=", text)[1:] for text in texts]
    whole = [call for each in calls for call in each[:-1]]  # the last may be cut off
    assert len(whole) > 12 and all(re.match(r"(int\(\d{1,2}|flag\((true|false))\)", call) for call in whole)
    assert any(text and not text.startswith("=") for text in texts)


def test_several_continuations_stop_strings_and_allowed_tokens(llm):
    three = llm.generate("a", json_params(PERSON, 3, n=3))[0].outputs
    assert len({output.text for output in three}) == 3
    [jsonschema.validate(json.loads(output.text), PERSON) for output in three]
    (stopped,) = llm.generate("a", json_params(PERSON, 3, stop='"age'))[0].outputs
    assert stopped.stop_reason == '"age' and three[0].text.startswith(stopped.text)
    tokenizer = llm.get_tokenizer()
    digits = [i for i in range(tokenizer.vocab_size) if tokenizer.has_token(i) and tokenizer.decode([i]) in tuple("13579")]
    odd = params(structured_outputs={"regex": "[0-9]{6}"}, allowed_token_ids=digits)
    assert set(llm.generate("a", odd)[0].outputs[0].text) <= set("13579")
    nothing = params(structured_outputs={"regex": "[a-z]+"}, allowed_token_ids=digits)
    assert llm.generate("a", nothing)[0].outputs[0].finish_reason == "error"
    assert llm.generate("a", odd.replace(allowed_token_ids=None, ignore_eos=True))[0].outputs[0].finish_reason == "stop"


def test_the_end_of_sequence_is_drawn_only_where_it_may_be(llm):
    """A grammar that can go on for ever ends by the model's own end of sequence, or at max_tokens."""
    ends = llm.generate(["a"] * 20, [params(s, structured_outputs={"regex": "a(b|c)*"}, logit_bias={4: 8}) for s in range(20)])
    assert all(re.fullmatch("a(b|c)*", output.outputs[0].text) for output in ends)
    assert {output.outputs[0].finish_reason for output in ends} >= {"stop"} and all(len(o.outputs[0].token_ids) >= 2 for o in ends)


@pytest.mark.parametrize(
    "asked, what",
    [
        ({}, "must be one of json"),
        ({"regex": "a", "choice": ["b"]}, "must be one of json"),
        ({"choice": []}, "must be one of json"),
        ({"regex": 3}, "must be one of json"),
        ({"jsn": {}}, "must be one of json"),
        ({"json": "{"}, "must be one of json"),
        ({"structural_tag": {"structures": []}}, "must be one of json"),
        ({"structural_tag": TAGS | {"triggers": ["("]}}, "must be one of json"),
        ({"structural_tag": TAGS | {"triggers": ["="], "at_least_one": True}}, "structural_tag"),
        ({"structural_tag": {"structures": [TAGS["structures"][0] | {"schema": {"type": "objec"}}], "triggers": ["="]}}, "Invalid type"),
        ({"regex": "(a"}, "unclosed group"),
        ({"json": {"type": "objec"}}, "Invalid type"),
        ({"grammar": 'start: missing "a"'}, "missing"),
        ({"json": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}, "structured_outputs"),
        ({"json": {"$ref": "#"}}, "allows no text at all"),
        ({"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"}, "too many expressions"),
        ({"regex": "(" * 5000 + ")" * 5000}, "invalid regex"),
    ],
)
def test_what_is_refused(llm, asked, what):
    with pytest.raises(RequestError, match=what):
        llm.generate("a", params(structured_outputs=asked))
    assert not llm.engine.has_work


def test_a_matcher_that_can_go_no_further_allows_nothing(llm):
    """So that its request ends with an error, and not as if its grammar were complete."""
    matcher = llm.engine.matcher(params(structured_outputs={"regex": "[a-z]{3}"}))
    other = matcher.copy()
    assert matcher.take(5) and matcher.error.startswith("structured_outputs: ") and other.error is None
    masks = llm.engine._grammars.masks([matcher, other])
    assert not masks[0].any() and masks[1].any()


def test_what_it_does_not_go_together_with(llm, folder):
    for more in ({"min_tokens": 3}, {"use_beam_search": True, "temperature": 0}):
        with pytest.raises(RequestError, match="does not go together"):
            params(structured_outputs={"regex": "a"}, **more)
    blind = LLM(folder, dtype="float32", max_num_seqs=1, max_model_len=64, skip_tokenizer_init=True, warmup=False)
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        blind.generate({"prompt_token_ids": [5]}, params(structured_outputs={"regex": "a"}))


def test_whole_steps_as_on_accelerators(folder, llm):
    """Scanned layers run as one program: the masks are there before it starts."""
    other = LLM(folder, dtype="float32", max_num_seqs=8, max_num_batched_tokens=16, max_model_len=192, page_size=4, scan_layers=True)
    asked = [json_params(PERSON, seed, temperature=0.7) for seed in range(5)]
    one, two = ([output.outputs[0].text for output in each.generate(["a"] * 5, asked)] for each in (llm, other))
    assert one == two and other.engine.runner.stats.compiles_after_warmup == 0


def test_masks_are_those_of_the_texts(llm):
    """Against a brute-force reading of the vocabulary."""
    tokenizer = llm.get_tokenizer()
    matcher = llm.engine.matcher(params(structured_outputs={"regex": "[a-z]{3}!"}))
    bits = np.unpackbits(llm.engine._grammars.masks([matcher]).view(np.uint8), bitorder="little")[: llm.engine.vocab_size]
    known = [i for i in range(tokenizer.vocab_size) if tokenizer.has_token(i) and i not in tokenizer.special_token_ids]
    texts = {i: tokenizer.decode([i]) for i in known}
    expected = {i for i, text in texts.items() if re.fullmatch("[a-z]{1,3}|[a-z]{3}!", text)}
    assert set(np.flatnonzero(bits)) == expected
