"""Sampling through the engine, against transformers' logits and vLLM's way with them (goldens/make_sampling_goldens.py)."""

import dataclasses
import json
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER, MODELS, generated, golden

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints import open_checkpoint, write_safetensors
from jaxllm.errors import ConfigError, RequestError
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.scheduler import Scheduler

CASE = "llama_gqa"
OPTIONS = dict(dtype="float32", max_num_seqs=8, max_num_batched_tokens=96, page_size=4, max_model_len=96, skip_tokenizer_init=True)
with np.load(FOLDER / "sampling.npz") as data:
    GENERATIONS = json.loads(str(data["generations"]))


def only(token):
    """Logits that leave no choice."""
    return lambda logits, i: jnp.where(jnp.arange(len(logits)) == token(i), 0.0, -jnp.inf)


PROCESSORS = {
    "next": lambda logits, tokens, count: jnp.roll(logits, 1),
    "count": lambda logits, tokens, count: only(lambda i: i)(logits, count),
    "climb": lambda logits, tokens, count: only(lambda i: i)(logits, (tokens[count - 1] + tokens[0]) % len(logits)),
    "none": lambda logits, tokens, count: jnp.where(count > 12, -jnp.inf, logits),
    "nan": lambda logits, tokens, count: logits.at[7].set(jnp.nan),
}


def check_nothing_is_left(llm):
    engine = llm.engine
    assert engine.runner.stats.compiles_after_warmup == 0
    assert engine.pool.num_free == engine.pool.capacity and not engine.has_work and not engine.scheduler.has_work


@contextmanager
def limited(llm, *, tokens=96, num_pages=None):
    """The engine as if made for fewer tokens a step, or with fewer pages: the programs are the same."""
    engine = llm.engine
    scheduler, pool = engine.scheduler, engine.pool
    engine.pool = PagePool((num_pages or pool.capacity) + 1)
    engine.scheduler = Scheduler(dataclasses.replace(engine.limits, max_num_batched_tokens=tokens), engine.pool)
    try:
        yield engine.scheduler
        check_nothing_is_left(llm)
    finally:
        engine.scheduler, engine.pool = scheduler, pool


@pytest.fixture(scope="module")
def whole_prompts():
    return LLM(MODELS / CASE, **OPTIONS, logits_processors=PROCESSORS)


@pytest.fixture
def llm(whole_prompts):
    """Prompts are cut into chunks of 16 tokens."""
    with limited(whole_prompts, tokens=16):
        yield whole_prompts


def prompts(case=CASE):
    return [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(case)]


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(generation):
    """The request whose tokens the golden has."""
    other = {name: value for name, value in generation.items() if name not in ("prompt", "output", "stop", "logprobs")}
    return SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, stop_token_ids=generation.get("stop"), logprobs=0, **other)


def check_generations(llm, generations):
    outputs = llm.generate([{"prompt_token_ids": g["prompt"]} for g in generations], [greedy(g) for g in generations])
    for generation, output in zip(generations, outputs, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == generation["output"]
        assert [list(place) for place in completion.logprobs] == [[token] for token in completion.token_ids]
        told = [place[token].logprob for place, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        np.testing.assert_allclose(told, generation["logprobs"], atol=2e-4)
        assert completion.cumulative_logprob == pytest.approx(sum(told))
        assert completion.finish_reason == ("length" if len(told) == 32 else "stop")


def test_generations_together_and_alone(llm):
    """Every request of the batch asks for something else."""
    check_generations(llm, GENERATIONS)
    for generation in GENERATIONS:
        check_generations(llm, [generation])


def test_generations_that_are_preempted(llm):
    with limited(llm, tokens=16, num_pages=24) as scheduler:
        check_generations(llm, GENERATIONS)
        assert scheduler.num_preemptions > 5


SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, logprobs=4)
EACH = [
    {},
    dict(top_k=9),
    dict(top_p=0.7),
    dict(min_p=0.1),
    dict(typical_p=0.6),
    dict(temperature=1.7, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9),
    dict(repetition_penalty=1.4),
    dict(presence_penalty=1.0, frequency_penalty=0.5),
    dict(allowed_token_ids=list(range(40))),
    dict(logit_bias={3: 4.0, 9: -100.0}),
    dict(min_tokens=20, stop_token_ids=list(range(64))),
    dict(logits_processor="next"),
    dict(logprobs=None),
    dict(logprobs=20, prompt_logprobs=3),
    dict(temperature=0.0),
]


def test_a_request_gives_the_same_in_a_batch_where_all_ask_for_something_else(llm):
    params = [SAMPLED.replace(**{"seed": i} | options) for i, options in enumerate(EACH)]
    each = [prompts()[i % 3] for i in range(len(EACH))]
    for output, prompt, one in zip(llm.generate(each, params), each, params, strict=True):
        alone = llm.generate(prompt, one)[0]
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids, one
        for name in ("logprobs", "prompt_logprobs"):
            ours, reference = (getattr(o, name) for o in ((output.outputs[0], alone.outputs[0]) if name == "logprobs" else (output, alone)))
            assert (ours is None) == (reference is None) == (getattr(one, name) is None)
            for place, other in zip(ours or (), reference or (), strict=True):
                assert (place is None) == (other is None)
                if place is not None:
                    assert {t: p.rank for t, p in place.items()} == {t: p.rank for t, p in other.items()}
                    assert [p.logprob for p in place.values()] == pytest.approx([p.logprob for p in other.values()], abs=1e-4)


def check_place(place, reference, token, k):
    """A token's log-probability, its rank, and the k likeliest, the token itself first."""
    order = np.argsort(-reference)
    assert list(place) == [token] + [i for i in order[:k].tolist() if i != token]
    for i, logprob in place.items():
        assert logprob.logprob == pytest.approx(reference[i], abs=2e-4) and logprob.rank == order.tolist().index(i) + 1
        assert logprob.decoded_token is None  # there is no tokenizer


def check_prompt(ours, prompt, logits, k):
    assert len(ours) == len(prompt) and ours[0] is None
    for i in range(1, len(logits)):
        check_place(ours[i], log_softmax(logits[i - 1]), prompt[i], k)


def test_prompt_logprobs(llm):
    params = [SamplingParams(temperature=0, max_tokens=1, logprobs=k, prompt_logprobs=k) for k in (0, 5, 20)]
    llm.generate(prompts(), params[0].replace(prompt_logprobs=None))  # leaves pages that must not be taken
    for _ in range(2):
        for output, reference, one in zip(llm.generate(prompts(), params), golden(CASE), params, strict=True):
            assert output.num_cached_tokens == 0
            check_prompt(output.prompt_logprobs, output.prompt_token_ids, reference["logits"], one.prompt_logprobs)
            token = reference["greedy"][0].item()
            check_place(output.outputs[0].logprobs[0], log_softmax(reference["logits"][-1]), token, one.logprobs)
    assert llm.generate(prompts(), params[0].replace(prompt_logprobs=None))[2].num_cached_tokens > 0  # others do take them


def test_prompt_logprobs_of_more_than_a_block(whole_prompts):
    """71 rows in one step: the logits of the first 40 are known, and of the rest that transformers took the likeliest."""
    llm, reference = whole_prompts, golden(CASE)[2]
    prompt = reference["prompt"].tolist() + reference["greedy"].tolist()
    params = SamplingParams(max_tokens=4, n=3, seed=1, ignore_eos=True, prompt_logprobs=2)
    ours = llm.generate({"prompt_token_ids": prompt}, params)[0].prompt_logprobs
    check_prompt(ours, prompt, reference["logits"], 2)
    assert [place[token].rank for place, token in zip(ours[40:], prompt[40:], strict=True)] == [1] * 32


def test_generated_logprobs_are_those_of_the_same_prompt(llm):
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=30, ignore_eos=True, logprobs=3)
    output = llm.generate(prompts()[1], params)[0]
    completion, first = output.outputs[0], len(output.prompt_token_ids)
    whole = {"prompt_token_ids": output.prompt_token_ids + completion.token_ids}
    again = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=3))[0].prompt_logprobs
    assert any(place[token].rank > 4 for place, token in zip(completion.logprobs, completion.token_ids, strict=True))
    for place, other in zip(completion.logprobs, again[first:], strict=True):
        assert {t: p.rank for t, p in place.items()} == {t: p.rank for t, p in other.items()}
        assert [p.logprob for p in place.values()] == pytest.approx([p.logprob for p in other.values()], abs=1e-4)


def test_logprobs_in_a_stream_and_of_each_completion(llm):
    seen = [0, 0]
    for output in llm.stream(prompts()[0], SAMPLED.replace(n=2, seed=3, logprobs=1)):
        lengths = [len(o.logprobs) for o in output.outputs]
        assert lengths == [len(o.token_ids) for o in output.outputs] and all(np.greater_equal(lengths, seen))
        seen = lengths
        assert all(token in place for o in output.outputs for token, place in zip(o.token_ids, o.logprobs, strict=True))
    assert seen == [24, 24]


def test_logits_processors(llm):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    names = ["next", None, "count", "climb"]
    asked = [params.replace(logits_processor=name) for name in names]
    for i, prompt in enumerate(prompts()):
        following, plain, count, climb = (o.outputs[0].token_ids for o in llm.generate([prompt] * 4, asked))
        ids, reference = prompt["prompt_token_ids"], generated(CASE)[i]
        assert following[0] == (reference[0] + 1) % 128 and plain == reference[:12]
        assert count == list(range(len(ids), len(ids) + 12))
        assert climb == [(ids[-1] + ids[0] * step) % 128 for step in range(1, 13)]
    sampled = llm.generate(prompts(), params.replace(logits_processor="count", temperature=2.0, seed=0))
    assert [o.outputs[0].token_ids for o in sampled] == [list(range(n, n + 12)) for n in (5, 21, 40)]
    with pytest.raises(RequestError, match="logits_processor: unknown processor `counts`; did you mean `count`"):
        llm.generate(prompts()[0], params.replace(logits_processor="counts"))


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0}, {"logprobs": 2, "top_k": 5, "temperature": 0.5}], ids=str)
def test_logits_that_nothing_can_be_drawn_from_are_an_error(llm, options):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20, "ignore_eos": True, **options})
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = llm.generate(prompts()[1], plain)[0].outputs[0]
    prompt = {"prompt_token_ids": list(range(10, 20))}
    each = [params.replace(logits_processor="nan"), plain, params.replace(logits_processor="none")]
    nan, beside, none = llm.generate([prompt, prompts()[1], prompt], each)
    assert beside.outputs[0] == alone  # others do not notice
    for output, length in ((nan, 0), (none, 3)):
        assert output.finished
        for completion in output.outputs:
            assert completion.finish_reason == "error" and "NaN" in completion.stop_reason
            assert completion.index or len(completion.token_ids) == length  # the others end where the first does
            assert all(token >= 0 for token in completion.token_ids)


def test_logits_processors_come_back_from_preemption(llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logits_processor="climb")
    with limited(llm, num_pages=24) as scheduler:
        outputs = llm.generate(prompts() * 2, params)
        assert scheduler.num_preemptions > 0
    for output in outputs:
        ids = output.prompt_token_ids
        assert output.outputs[0].token_ids == [(ids[-1] + ids[0] * step) % 128 for step in range(1, 31)]


BAD_PROCESSORS = {
    "no function": (5, "logits_processors: 'bad' must be a function"),
    "other arguments": (lambda logits: logits, "logits_processors: 'bad' cannot be traced"),
    "python branches": (lambda logits, tokens, count: logits if count > 3 else -logits, "logits_processors: 'bad' cannot be traced"),
    "other shape": (lambda logits, tokens, count: logits[:5], "logits_processors: 'bad' must return logits of shape [128], not [5]"),
    "no array": (lambda logits, tokens, count: None, "logits_processors: 'bad' must return logits of shape [128], not NoneType"),
    "integers": (lambda logits, tokens, count: tokens.sum() + jnp.arange(128), "'bad' must return floating-point logits, not int32"),
}


@pytest.mark.parametrize("case", BAD_PROCESSORS)
def test_logits_processors_are_tried_before_anything_is_compiled(case):
    function, message = BAD_PROCESSORS[case]
    with pytest.raises(ConfigError) as error:
        LLM(MODELS / CASE, **OPTIONS, logits_processors={"bad": function})
    assert message in str(error.value)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    source = open_checkpoint(MODELS / CASE)
    tensors, config = {name: source.read(name) for name in source.tensors}, dict(source.config)
    draw = np.random.default_rng(0).normal(0, 0.5, (2, 640, config["hidden_size"])).astype(np.float32)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = draw
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = (FOLDER / "tokenizers" / "byte_bpe").iterdir()
    write_safetensors(folder, tensors.items(), {**config, "vocab_size": 640}, copy_files=tokenizer)
    llm = LLM(folder, **{**OPTIONS, "max_num_seqs": 2, "max_num_batched_tokens": 16, "skip_tokenizer_init": False}, warmup=False)
    yield llm
    check_nothing_is_left(llm)


def test_bad_words_do_not_appear(with_tokenizer):
    llm, tokenizer = with_tokenizer, with_tokenizer.get_tokenizer()
    pieces = tokenizer.encode("The lighthouse keeper woke before dawn and climbed", add_special_tokens=False)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, allowed_token_ids=pieces)
    told = lambda bad: llm.generate("The lighthouse", params.replace(bad_words=bad))[0].outputs[0].token_ids
    plain = told(None)
    pairs = [list(pair) for pair in zip(plain, plain[1:], strict=False)]
    words = [w for pair in pairs if tokenizer.encode(w := tokenizer.decode(pair).lstrip(), add_special_tokens=False) == pair]
    word = words[0]
    two = tokenizer.encode(word, add_special_tokens=False)
    where = pairs.index(two)
    banned = told([word])
    assert banned[: where + 1] == plain[: where + 1] and banned != plain  # its first token alone is none
    assert two not in [list(pair) for pair in zip(banned, banned[1:], strict=False)]
    one = next(t for t in plain if tokenizer.encode(tokenizer.decode([t]), add_special_tokens=False) == [t])
    assert one not in told([tokenizer.decode([one])])
    together = llm.generate(["The lighthouse"] * 2, [params.replace(bad_words=[word]), params])
    assert [o.outputs[0].token_ids for o in together] == [banned, plain]


def test_logprobs_say_their_tokens(with_tokenizer):
    tokenizer = with_tokenizer.get_tokenizer()
    params = SamplingParams(seed=0, temperature=3.0, max_tokens=30, logprobs=5, prompt_logprobs=2)
    output = with_tokenizer.generate("The lighthouse", params)[0]
    places = output.outputs[0].logprobs + output.prompt_logprobs[1:]
    for token, logprob in (item for place in places for item in place.items()):
        assert logprob.decoded_token == (tokenizer.decode([token]) if token <= 600 else None)  # the tokenizer has no more
    assert any(token > 600 for place in places for token in place)
