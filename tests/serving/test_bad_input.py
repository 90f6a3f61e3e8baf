"""Wrong things, one a row: each is refused with the right type of error and a message that names the culprit, and nothing else suffers."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_cases import FOLDER, MODELS

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints import open_checkpoint, write_safetensors
from jaxllm.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from jaxllm.serving import EngineConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

VOCAB, MAX_LEN = 640, 64  # the tokenizer has 601 tokens: as in many models, some rows stand for no token
OPTIONS = dict(dtype="float32", max_num_seqs=2, max_num_batched_tokens=16, page_size=4, max_model_len=MAX_LEN, warmup=False)
UP = "model.layers.1.mlp.up_proj.weight"


def tiny(case: str = "llama_gqa") -> tuple[dict[str, np.ndarray], dict]:
    source = open_checkpoint(MODELS / case)
    return {name: source.read(name) for name in source.tensors}, dict(source.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of the vocabulary size above, with a tokenizer and no chat template."""
    tensors, config = tiny()
    draw = np.random.default_rng(0).normal(0, 0.5, (2, VOCAB, config["hidden_size"])).astype(np.float32)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = draw
    tokenizer = FOLDER / "tokenizers" / "byte_bpe"
    out = tmp_path_factory.mktemp("tiny") / "model"
    return write_safetensors(out, tensors.items(), {**config, "vocab_size": VOCAB}, copy_files=tokenizer.iterdir())


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **OPTIONS)


@pytest.fixture(scope="module")
def without_tokenizer(folder):
    return LLM(folder, **OPTIONS, skip_tokenizer_init=True)


GOOD = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(llm):
    """What a good request gives before anything bad has happened."""
    return llm.generate("The lighthouse keeper", GOOD)[0].outputs[0].token_ids


def check_unharmed(llm: LLM, expected: list[int]) -> None:
    engine = llm.engine
    assert engine.pool.num_free == engine.pool.capacity and not engine.has_work and not engine.scheduler.has_work
    assert llm.generate("The lighthouse keeper", GOOD)[0].outputs[0].token_ids == expected
    assert engine.pool.num_free == engine.pool.capacity and not engine.has_work and not engine.scheduler.has_work


# --- Sampling parameters ---------------------------------------------------------------------------------------------

BAD_PARAMS = {
    "unknown": (dict(temprature=1), "unknown parameter `temprature`; did you mean `temperature`?"),
    "not implemented": (dict(best_of=4), "unknown parameter `best_of`"),
    "temperature NaN": (dict(temperature=float("nan")), "temperature must be 0 (greedy) or above, not nan"),
    "temperature infinite": (dict(temperature=float("inf")), "temperature must be 0 (greedy) or above, not inf"),
    "temperature huge": (dict(temperature=10**400), "temperature must be"),
    "temperature negative": (dict(temperature=-0.1), "temperature must be 0 (greedy) or above, not -0.1"),
    "temperature text": (dict(temperature="0.7"), "temperature must be 0 (greedy) or above, not '0.7'"),
    "temperature none": (dict(temperature=None), "temperature must be 0 (greedy) or above, not None"),
    "temperature bool": (dict(temperature=True), "temperature must be 0 (greedy) or above, not True"),
    "top_p zero": (dict(top_p=0), "top_p must be above 0 and at most 1, not 0"),
    "top_p over": (dict(top_p=1.5), "top_p must be above 0 and at most 1, not 1.5"),
    "top_p NaN": (dict(top_p=float("nan")), "top_p must be above 0 and at most 1, not nan"),
    "top_k fraction": (dict(top_k=2.5), "top_k must be a whole number"),
    "top_k below": (dict(top_k=-2), "top_k must be a whole number"),
    "top_k bool": (dict(top_k=True), "top_k must be a whole number"),
    "min_p over": (dict(min_p=1.01), "min_p must be between 0 and 1, not 1.01"),
    "max_tokens zero": (dict(max_tokens=0), "max_tokens must be a whole number of at least 1, not 0"),
    "max_tokens bool": (dict(max_tokens=True), "max_tokens must be a whole number of at least 1, not True"),
    "max_tokens float": (dict(max_tokens=16.0), "max_tokens must be a whole number of at least 1, not 16.0"),
    "seed negative": (dict(seed=-1), "seed must be a whole number from 0 to 2**64 - 1, not -1"),
    "seed large": (dict(seed=2**64), "seed must be a whole number from 0 to 2**64 - 1"),
    "stop empty": (dict(stop=["a", ""]), "stop must be a string, or a list of up to 256 strings, none of them empty"),
    "stop many": (dict(stop=["a"] * 257), "stop must be a string, or a list of up to 256 strings"),
    "stop long": (dict(stop=["a" * 1001]), "none of them empty or longer than 1000 characters"),
    "stop number": (dict(stop=5), "stop must be a string, or a list of up to 256 strings"),
    "stop bytes": (dict(stop=[b"a"]), "stop must be a string, or a list of up to 256 strings"),
    "stop token text": (dict(stop_token_ids=["2"]), "stop_token_ids must be a list of token ids"),
    "stop token alone": (dict(stop_token_ids=2), "stop_token_ids must be a list of token ids, not 2"),
    "stop token negative": (dict(stop_token_ids=[-1]), "stop_token_ids must be a list of token ids, not [-1]"),
    "ignore_eos number": (dict(ignore_eos=1), "ignore_eos must be true or false, not 1"),
    "skip_special_tokens text": (dict(skip_special_tokens="no"), "skip_special_tokens must be true or false, not 'no'"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_sampling_params(case):
    fields, message = BAD_PARAMS[case]
    with pytest.raises(RequestError) as error:
        SamplingParams(**fields)
    assert message in str(error.value)


def test_a_changed_copy_is_checked_too():
    with pytest.raises(RequestError, match="unknown parameter `temprature`"):
        SamplingParams().replace(temprature=0)
    with pytest.raises(RequestError, match="top_p must be"):
        SamplingParams().replace(top_p=2)


# --- Requests --------------------------------------------------------------------------------------------------------

IDS = {"prompt_token_ids": [5, 6, 7]}
BAD_REQUESTS = {
    "prompts a number": (lambda m: m.generate(5), RequestError, "prompts must be a prompt or a list of them, not 5"),
    "prompts none": (lambda m: m.generate(None), RequestError, "prompts must be a prompt or a list of them, not None"),
    "prompts bytes": (lambda m: m.generate(b"hi"), RequestError, "prompts must be a prompt or a list of them, not b'hi'"),
    "prompt a number": (
        lambda m: m.generate([5]),
        RequestError,
        "a prompt is a string, {'prompt': ...} or {'prompt_token_ids': [...]}, not 5",
    ),
    "prompt with strange keys": (lambda m: m.generate({"text": "hi"}), RequestError, "not {'text': 'hi'}"),
    "prompt with more keys": (lambda m: m.generate({"prompt": "a", "images": []}), RequestError, "'images': []"),
    "prompt text a number": (lambda m: m.generate({"prompt": 5, **IDS}), RequestError, "text of a prompt must be a string, not int"),
    "prompt nothing": (lambda m: m.generate({"prompt": None}), RequestError, "must be a string, but it is a NoneType"),
    "prompt empty": (lambda m: m.generate(""), RequestError, "the prompt has no tokens"),
    "prompt of no ids": (lambda m: m.generate({"prompt_token_ids": []}), RequestError, "the prompt has no tokens"),
    "lone surrogate": (lambda m: m.generate("a\ud800b"), RequestError, "lone surrogate '\\ud800' at position 1"),
    "ids text": (lambda m: m.generate({"prompt_token_ids": "567"}), RequestError, "prompt_token_ids must be a list of token ids, not str"),
    "ids a number": (lambda m: m.generate({"prompt_token_ids": 5}), RequestError, "prompt_token_ids must be a list of token ids, not int"),
    "id negative": (lambda m: m.generate({"prompt_token_ids": [5, -1]}), RequestError, "has -1: token ids are whole numbers from 0 to 639"),
    "id too large": (
        lambda m: m.generate({"prompt_token_ids": [VOCAB]}),
        RequestError,
        "has 640: token ids are whole numbers from 0 to 639",
    ),
    "id a bool": (lambda m: m.generate({"prompt_token_ids": [True]}), RequestError, "has True: token ids"),
    "id a fraction": (lambda m: m.generate({"prompt_token_ids": [5.0]}), RequestError, "has 5.0: token ids"),
    "id none": (lambda m: m.generate({"prompt_token_ids": [None]}), RequestError, "has None: token ids"),
    "prompt too long": (
        lambda m: m.generate({"prompt_token_ids": [5] * MAX_LEN}),
        RequestError,
        "the prompt has 64 tokens, and max_model_len=64 leaves no room",
    ),
    "answer too long": (
        lambda m: m.generate(IDS, SamplingParams(max_tokens=62)),
        RequestError,
        "3 prompt tokens and 62 more exceed max_model_len=64: shorten the prompt or lower max_tokens",
    ),
    "answer beyond all": (lambda m: m.generate(IDS, SamplingParams(max_tokens=10**30)), RequestError, "exceed max_model_len=64"),
    "stop token too large": (lambda m: m.generate(IDS, SamplingParams(stop_token_ids=[VOCAB])), RequestError, "stop_token_ids has 640"),
    "params of another type": (lambda m: m.generate(IDS, {"temperature": 0}), RequestError, "sampling_params must be a SamplingParams"),
    "params a number": (
        lambda m: m.generate(IDS, 0.7),
        RequestError,
        "sampling_params must be a SamplingParams or a list of them, not 0.7",
    ),
    "params text": (lambda m: m.generate(["a", "b"], ["x", "y"]), RequestError, "sampling_params must be a SamplingParams, not str"),
    "lengths differ": (lambda m: m.generate([IDS] * 3, [GOOD] * 2), RequestError, "3 prompts came with 2 sampling_params"),
    "one bad among good": (lambda m: m.generate([IDS, "good", IDS, {"prompt_token_ids": [-5]}], GOOD), RequestError, "has -5"),
    "the last is too long": (lambda m: m.generate([IDS, IDS, {"prompt_token_ids": [1] * 99}], GOOD), RequestError, "has 99 tokens"),
    "stream a number": (lambda m: m.stream(5), RequestError, "a prompt is a string"),
    "stream a list": (lambda m: m.stream(["a", "b"]), RequestError, "a prompt is a string"),
    "stream wrong params": (lambda m: m.stream("a", 0), RequestError, "sampling_params must be a SamplingParams, not int"),
    "stream empty": (lambda m: m.stream(""), RequestError, "the prompt has no tokens"),
    "chat without template": (lambda m: m.chat([{"role": "user", "content": "hi"}]), TokenizerError, "no chat template"),
    "chat text": (lambda m: m.chat("hi", chat_template="x"), RequestError, "messages must be a list of messages (dicts)"),
    "chat nothing": (lambda m: m.chat([], chat_template="x"), RequestError, "empty"),
    "chat none": (lambda m: m.chat(None, chat_template="x"), RequestError, "messages must be a list of messages (dicts)"),
    "chat of numbers": (lambda m: m.chat([1, 2], chat_template="x"), RequestError, "messages must be a list, but it is a int"),
    "chat without role": (lambda m: m.chat([{"content": "hi"}], chat_template="x"), RequestError, "role"),
    "chat without content": (lambda m: m.chat([{"role": "user"}], chat_template="x"), RequestError, "content"),
    "chat with a broken template": (lambda m: m.chat([{"role": "user", "content": "a"}], chat_template="{% if"), TokenizerError, "Jinja"),
}


# Parameters that are fine by themselves, and not with this prompt and engine.
BAD_HERE = {
    "bias of no token": (dict(logit_bias={VOCAB: 1}), "logit_bias has 640: token ids are whole numbers from 0 to 639"),
    "no such token allowed": (dict(allowed_token_ids=[5, VOCAB]), "allowed_token_ids has 640"),
    "bad word a surrogate": (dict(bad_words=["\ud800"]), "lone surrogate '\\ud800'"),
    "bad word a space": (dict(bad_words=[" "]), "bad_words has ' ', which has no tokens"),
    "bad word far too long": (dict(bad_words=["x" * 129]), "none of them empty or longer than 128 characters"),
    "bad word too long": (dict(bad_words=["lighthouse keeper " * 7]), "bad_words may be 128 words of up to 8 tokens"),
    "logprobs too many": (dict(logprobs=21), "logprobs=21 exceeds the engine's max_logprobs=20"),
    "prompt_logprobs too many": (dict(prompt_logprobs=10**30), "exceeds the engine's max_logprobs=20"),
    "min_tokens beyond all": (dict(min_tokens=10**30, max_tokens=None), "exceeds the 61 tokens that there is room for"),
    "nothing to draw": (dict(min_tokens=1, stop_token_ids=list(range(VOCAB))), "min_tokens and bad_words leave no token to draw"),
    "no processors": (dict(logits_processor="x"), "logits_processor='x', and this engine was made without any"),
    "more beams than logprobs": (dict(use_beam_search=True, temperature=0, n=11), "beam_width=11 needs the 22 likeliest tokens"),
}
for _name, (_params, _message) in BAD_HERE.items():
    BAD_REQUESTS[_name] = (lambda m, params=_params: m.generate(IDS, SamplingParams(**params)), RequestError, _message)


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_harms_nothing(llm, expected, case):
    request, kind, message = BAD_REQUESTS[case]
    state = llm.engine.runner.state.slots.last_tokens
    with pytest.raises(kind) as error:
        request(llm)
    assert type(error.value) is kind and message in str(error.value)
    assert llm.engine.runner.state.slots.last_tokens is state  # each step replaces it: nothing has run
    check_unharmed(llm, expected)


BAD_WITHOUT_TOKENIZER = {
    "text": (lambda m: m.generate("hello"), "skip_tokenizer_init: it has no tokenizer"),
    "stop string": (lambda m: m.generate(IDS, SamplingParams(stop="x")), "stop needs a tokenizer"),
    "chat": (lambda m: m.chat([{"role": "user", "content": "hi"}], chat_template="x"), "skip_tokenizer_init: it has no tokenizer"),
    "get_tokenizer": (lambda m: m.get_tokenizer(), "skip_tokenizer_init: it has no tokenizer"),
}


@pytest.mark.parametrize("case", BAD_WITHOUT_TOKENIZER)
def test_what_needs_a_tokenizer_is_refused_without_one(without_tokenizer, case):
    request, message = BAD_WITHOUT_TOKENIZER[case]
    with pytest.raises(RequestError) as error:
        request(without_tokenizer)
    assert message in str(error.value)
    output = without_tokenizer.generate(IDS, GOOD)[0].outputs[0]
    assert (len(output.token_ids), output.text) == (6, "")
    assert without_tokenizer.engine.pool.num_free == without_tokenizer.engine.pool.capacity


# --- Rough handling that is not an error -----------------------------------------------------------------------------


def test_tokens_that_the_tokenizer_lacks_have_no_text(llm, expected):
    """Ids from 601 to 639 are rows of the model and no tokens: they may be given and drawn."""
    output = llm.generate({"prompt_token_ids": [610, 639, 5]}, SamplingParams(seed=1, max_tokens=40, temperature=50.0, ignore_eos=True))[0]
    ids = output.outputs[0].token_ids
    assert max(ids) > 600, "no such id was drawn: choose another seed"
    assert output.outputs[0].text == llm.get_tokenizer().decode([i for i in ids if i <= 600])
    check_unharmed(llm, expected)


def test_without_max_tokens_a_request_fills_the_context(llm):
    completion = llm.generate(IDS, GOOD.replace(max_tokens=None))[0].outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (MAX_LEN - 3, "length")


def test_nothing_asked_nothing_answered(llm):
    assert llm.generate([]) == [] and llm.generate([], []) == []


def test_streams_that_nobody_reads_leave_nothing_behind(llm, expected):
    llm.stream("dropped at once", GOOD)
    stream = llm.stream("closed before it is read", GOOD)
    stream.close()
    assert list(stream) == []
    check_unharmed(llm, expected)


def test_a_stream_goes_on_while_other_calls_drive_the_engine(llm, expected):
    first, second = llm.stream("The lighthouse keeper", GOOD), llm.stream("The lighthouse keeper", GOOD.replace(max_tokens=3))
    next(first)
    assert llm.generate("The lighthouse keeper", GOOD)[0].outputs[0].token_ids == expected  # both streams end in here
    assert [o.outputs[0].token_ids for o in second] == [expected[:3]]
    assert list(first)[-1].outputs[0].token_ids == expected
    check_unharmed(llm, expected)


def test_a_stream_whose_request_was_aborted_says_so(llm, expected):
    stream = llm.stream("The lighthouse keeper", GOOD)
    request_id = next(stream).request_id
    llm.engine.abort(request_id)
    with pytest.raises(RequestError, match="aborted"):
        list(stream)
    check_unharmed(llm, expected)


# --- Engines ---------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown": (dict(max_num_sequences=4), "unknown key `max_num_sequences`; did you mean `max_num_seqs`?"),
    "dtype": (dict(dtype="int4"), "`dtype`: expected auto|float32|bfloat16|float16, got 'int4'"),
    "max_num_seqs text": (dict(max_num_seqs="many"), "`max_num_seqs`: expected int, got 'many'"),
    "max_num_seqs zero": (dict(max_num_seqs=0), "max_num_seqs must be a whole number of at least 1, not 0"),
    "max_num_seqs bool": (dict(max_num_seqs=True), "`max_num_seqs`: expected int, got true"),
    "max_model_len fraction": (dict(max_model_len=9.5), "`max_model_len`: expected int or null, got 9.5"),
    "page_size negative": (dict(page_size=-16), "page_size must be a whole number of at least 1, not -16"),
    "memory_fraction": (dict(memory_fraction=1.5), "memory_fraction must be above 0 and at most 1, not 1.5"),
    "memory_fraction NaN": (dict(memory_fraction=float("nan")), "memory_fraction must be above 0 and at most 1, not nan"),
    "warmup text": (dict(warmup="perhaps"), "`warmup`: expected bool, got 'perhaps'"),
    "too few tokens a step": (
        dict(max_num_batched_tokens=4, max_num_seqs=8),
        "max_num_batched_tokens=4 is less than a token for each of max_num_seqs=8",
    ),
    "two sizes of the cache": (
        dict(num_pages=8, kv_cache_memory_bytes=1 << 20),
        "num_pages and kv_cache_memory_bytes both size the KV cache",
    ),
    "too few pages": (dict(num_pages=15), "the KV cache has room for 60 tokens, and max_model_len=64 needs"),
    "too few bytes": (dict(kv_cache_memory_bytes=1000), "lower max_model_len, or raise kv_cache_memory_bytes or num_pages"),
    "too long": (dict(max_model_len=1000), "max_model_len=1000 exceeds the 96 positions"),
    "too few devices": (dict(tensor_parallel_size=64), "tensor=64 needs 64 devices, and there are 8"),
    "devices that divide nothing": (
        dict(tensor_parallel_size=7),
        "tensor_parallel_size=7 divides neither the heads, the MLP nor the vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_engine_options(folder, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ConfigError) as error:
        LLM(folder, **{**OPTIONS, **options})
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["max_num_seqs", "max_model_len", "memory_fraction"])
@pytest.mark.parametrize("value", ["8", True, -1, float("nan")])
def test_engine_config_checks_itself(field, value):
    with pytest.raises(ConfigError, match=field):
        EngineConfig(model="m", **{field: value})


NO_MODEL = {
    "none": (None, ConfigError, "`model`: expected text, got null"),
    "a number": (5, ConfigError, "`model`: expected text, got 5"),
    "nothing": ("", ConfigError, "model must name a folder"),
    "no such path": ("./no/such/model", CheckpointError, "There is no model './no/such/model'"),
    "misspelt": ("demmo", CheckpointError, "Did you mean demo?"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_model_names(case):
    name, kind, message = NO_MODEL[case]
    with pytest.raises(kind) as error:
        LLM(name)
    assert message in str(error.value)


def test_tokenizers_that_are_missing_or_elsewhere(folder, tmp_path):
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor tokenizer.model"):
        LLM(MODELS / "llama_gqa", warmup=False)
    with pytest.raises(CheckpointError, match="no-such-folder"):
        LLM(folder, tokenizer="./no-such-folder", warmup=False)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        LLM(tmp_path / "model", warmup=False)


# --- Checkpoints -----------------------------------------------------------------------------------------------------

_ROPE = {"rope_theta": 10000.0, "rope_type": "magic"}
BAD_CHECKPOINTS = {  # (change of tensors t and config c, what the message says, the golden to start from)
    "NaN": (lambda t, c: t[UP].__setitem__((1, 2), np.nan), f"NaN or infinity in {UP}", "llama_gqa"),
    "infinity": (lambda t, c: t["model.norm.weight"].__setitem__(0, np.inf), "NaN or infinity in model.norm.weight", "llama_gqa"),
    "missing": (lambda t, c: t.pop(UP), f"{UP} is missing", "llama_gqa"),
    "head missing": (
        lambda t, c: t.pop("lm_head.weight"),
        "lm_head.weight is missing (config.json says tie_word_embeddings=false)",
        "llama_gqa",
    ),
    "extra": (lambda t, c: t.update(spare=t[UP]), "spare matches nothing in a llama model", "llama_gqa"),
    "a bias that the family lacks": (
        lambda t, c: t.update({UP.replace("weight", "bias"): np.zeros(48, np.float32)}),
        "up_proj.bias",
        "llama_gqa",
    ),
    "shape": (lambda t, c: t.update({UP: t[UP][:-1]}), f"{UP} has shape [47, 32], and the configuration makes it [48, 32]", "llama_gqa"),
    "rank": (lambda t, c: t.update({UP: t[UP].reshape(-1)}), f"{UP} has shape [1536]", "llama_gqa"),
    "integers": (lambda t, c: t.update({UP: t[UP].astype(np.int8)}), f"{UP} is of type int8", "llama_gqa"),
    "fewer layers than tensors": (lambda t, c: c.update(num_hidden_layers=2), "model.layers.2.", "llama_gqa"),
    "more layers than tensors": (lambda t, c: c.update(num_hidden_layers=4), "model.layers.3.", "llama_gqa"),
    "fused too short": (
        lambda t, c: t.update({"model.layers.0.self_attn.qkv_proj.weight": t["model.layers.0.self_attn.qkv_proj.weight"][:-8]}),
        "model.layers.0.self_attn.qkv_proj.weight has",
        "phi3",
    ),
    "fused of no axes": (
        lambda t, c: t.update({"model.layers.0.mlp.gate_up_proj.weight": np.zeros((), np.float32)}),
        "model.layers.0.mlp.gate_up_proj.weight has shape []",
        "phi3",
    ),
    "quantised": (
        lambda t, c: c.update(quantization_config={"quant_method": "gptq"}),
        "quantised with 'gptq' are not implemented",
        "llama_gqa",
    ),
    "quantised strangely": (
        lambda t, c: c.update(quantization_config="gptq"),
        "quantization_config must be an object, not 'gptq'",
        "llama_gqa",
    ),
    "model_type unknown": (
        lambda t, c: c.update(model_type="lama"),
        "model_type 'lama' is not implemented; the nearest is 'llama'",
        "llama_gqa",
    ),
    "model_type missing": (lambda t, c: c.pop("model_type"), "lacks 'model_type'", "llama_gqa"),
    "model_type a list": (lambda t, c: c.update(model_type=["llama"]), "model_type must be text, not ['llama']", "llama_gqa"),
    "size missing": (lambda t, c: c.pop("hidden_size"), "lacks 'hidden_size'", "llama_gqa"),
    "size as text": (lambda t, c: c.update(hidden_size="32"), "hidden_size must be a whole number, not '32'", "llama_gqa"),
    "size a fraction": (lambda t, c: c.update(num_hidden_layers=3.0), "num_hidden_layers must be a whole number, not 3.0", "llama_gqa"),
    "size zero": (lambda t, c: c.update(vocab_size=0), "vocab_size must be at least 1, not 0", "llama_gqa"),
    "no layers": (lambda t, c: c.update(num_hidden_layers=0), "no layers", "llama_gqa"),
    "flag as text": (lambda t, c: c.update(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, not 'no'", "llama_gqa"),
    "epsilon as text": (lambda t, c: c.update(rms_norm_eps="1e-5"), "rms_norm_eps must be a number, not '1e-5'", "llama_gqa"),
    "heads unequal": (lambda t, c: c.update(num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads", "llama_gqa"),
    "layer_types too short": (lambda t, c: c["layer_types"].pop(), "layer_types has", "gemma2"),
    "layer_types unknown": (
        lambda t, c: c["layer_types"].__setitem__(0, "linear_attention"),
        "layer_types linear_attention not implemented",
        "gemma2",
    ),
    "layer_types of numbers": (lambda t, c: c["layer_types"].__setitem__(0, 1), "layer_types 1 not implemented", "gemma2"),
    "layer_types an object": (lambda t, c: c.update(layer_types={"0": "full_attention"}), "layer_types must be a list", "gemma2"),
    "rope unknown": (lambda t, c: c.update(rope_parameters=_ROPE), "rotary scaling 'magic' is not implemented", "llama_gqa"),
    "rope a list": (lambda t, c: c.update(rope_parameters=["default"]), "rope_parameters must be an object", "llama_gqa"),
    "rope without factor": (
        lambda t, c: c.update(rope_parameters={**_ROPE, "rope_type": "linear"}),
        "'linear' lacks 'factor'",
        "llama_gqa",
    ),
    "rope factor as text": (lambda t, c: c.update(rope_parameters={**_ROPE, "rope_type": "linear", "factor": "two"}), "'two'", "llama_gqa"),
    "activation": (lambda t, c: c.update(hidden_act="swiglu"), "hidden_act='swiglu' is not implemented", "llama_gqa"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_checkpoints(tmp_path, case):
    change, message, golden = BAD_CHECKPOINTS[case]
    tensors, config = tiny(golden)
    change(tensors, config)
    write_safetensors(tmp_path / "model", tensors.items(), config)
    with pytest.raises(CheckpointError) as error:
        LLM(tmp_path / "model", **OPTIONS, skip_tokenizer_init=True)
    assert message in str(error.value)


def test_broken_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        LLM(tmp_path / "empty")
    shutil.copytree(MODELS / "qwen2", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as error:  # all that is wrong, in one message
        LLM(tmp_path / "cut")
    assert "config.json is not valid JSON" in str(error.value) and "model.safetensors is truncated" in str(error.value)


def test_a_weight_too_large_for_the_dtype_is_named(tmp_path):
    tensors, config = tiny()
    tensors[UP][0, 0] = 1e6
    write_safetensors(tmp_path / "model", tensors.items(), config)
    with pytest.raises(CheckpointError) as error:
        LLM(tmp_path / "model", **{**OPTIONS, "dtype": "float16"}, skip_tokenizer_init=True)
    assert f"infinity in {UP} (as float16)" in str(error.value)


def test_a_head_beside_tied_embeddings_is_no_error(tmp_path):
    """Many exports of tied models hold a copy of the embedding as lm_head."""
    tensors, config = tiny("llama_mha_tied")
    write_safetensors(tmp_path / "model", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}.items(), config)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True
    options = dict(**OPTIONS, skip_tokenizer_init=True)
    with_head, without = (LLM(path, **options).generate(IDS, GOOD) for path in (tmp_path / "model", MODELS / "llama_mha_tied"))
    assert with_head[0].outputs[0].token_ids == without[0].outputs[0].token_ids
