"""What changes how a request is computed must not change what it gives, and neither must any such things together.

The reference is transformers' greedy tokens; for what is drawn or bent, the same request alone, uncut, in the plain engine.
"""

import dataclasses
import itertools
from functools import lru_cache

import pytest
from golden_cases import LENGTH, MODELS, generated, golden

from jaxllm import LLM, SamplingParams
from jaxllm.serving.kv_cache import PagePool
from jaxllm.serving.request import completion_seed
from jaxllm.serving.scheduler import Scheduler

CASES = ["llama_gqa", "gemma3_text_5to1", "mistral", "qwen2_window"]
WINDOWED = {"gemma3_text_5to1", "mistral", "qwen2_window"}
# How the engine runs ...
ENGINE = ("chunked prefill", "prefix cache", "preemption")
# ... and what requests ask for.
REQUEST = {
    "n": dict(n=3),
    "logprobs": dict(logprobs=3),
    "penalties": dict(repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=-0.2),
}
FEATURES = [*ENGINE, "sliding window", *REQUEST]
# Prefix caching stays on for the engine, so that no step has one row; `with_engine` turns it off for requests.
PLAIN = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, page_size=4, max_model_len=LENGTH, skip_tokenizer_init=True)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=32, ignore_eos=True)


def prompts(case):
    return [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(case)]


def told(output):
    """Of each completion its tokens, and their log-probabilities as (tokens, values)."""
    split = lambda places: [(list(place), [p.logprob for p in place.values()]) for place in places or ()]
    return [(o.token_ids, split(o.logprobs)) for o in output.outputs]


def assert_same(ours, expected, where):
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected], where
    for (_, places), (_, reference) in zip(ours, expected, strict=True):
        assert [tokens for tokens, _ in places] == [tokens for tokens, _ in reference], where
        for (_, values), (_, near) in zip(places, reference, strict=True):
            assert values == pytest.approx(near, abs=1e-4), where  # float32 sums in another order


@lru_cache(1)
def plain(case):
    return LLM(MODELS / case, **PLAIN, warmup=False)


def with_engine(llm, made):
    """The engine as if it had been made so. Only the scheduler and its pool differ; the programs are the same, and compiled once."""
    engine = llm.engine
    limits = dataclasses.replace(engine.limits, max_num_batched_tokens=16 if "chunked prefill" in made else 64)
    engine.pool = PagePool(LENGTH // 4 + 5 if "preemption" in made else engine.runner.num_pages)
    engine.scheduler, engine._shares_pages = Scheduler(limits, engine.pool), "prefix cache" in made
    return llm


@lru_cache
def references(case, asked, base):
    """What each prompt gives alone, each completion as a request of its own."""
    llm, params = with_engine(plain(case), ()), with_features(base, asked)
    each = [params.replace(n=1, seed=completion_seed(7, i)) for i in range(params.n)] if params.n > 1 else [params]
    return [[told(llm.generate(prompt, one)[0])[0] for one in each] for prompt in prompts(case)]


def all_subsets(names):
    return [frozenset(c) for r in range(len(names) + 1) for c in itertools.combinations(names, r)]


def with_features(base, asked):
    if "n" in asked and base.temperature == 0:
        return None  # they would all be the same
    return base.replace(**{name: value for feature in asked for name, value in REQUEST[feature].items()})


def check(case, features):
    made, asked = frozenset(features).intersection(ENGINE), frozenset(features).intersection(REQUEST)
    for base in (GREEDY, SAMPLED):
        params = with_features(base, asked)
        if params is None:
            continue
        expected, llm = references(case, asked, base), with_engine(plain(case), made)
        for turn in range(2):  # the second over what the first left in the cache
            outputs = llm.generate(prompts(case), params)
            if base is GREEDY and "penalties" not in asked:
                assert [o.outputs[0].token_ids for o in outputs] == generated(case)
            for prompt, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
                assert_same(told(output), reference, (base.temperature, prompt, turn))
            if "prefix cache" in made and "preemption" not in made:
                assert turn == 0 or all(o.num_cached_tokens > 0 for o in outputs)
        assert ("preemption" in made) == (llm.engine.scheduler.num_preemptions > 0)
        assert llm.engine.pool.num_free == llm.engine.pool.capacity and not llm.engine.scheduler.has_work


def combinations():
    """Every set of features on every model, most of them slow. Quick are the pairs: those without a sliding window on one model, and a
    window with each other feature on another."""
    every = []
    for case in CASES:
        for others in all_subsets([*ENGINE, *REQUEST]):
            quick = len(others) == {"llama_gqa": 2, "gemma3_text_5to1": 1}.get(case)
            features = [f for f in FEATURES if f in others or (f == "sliding window" and case in WINDOWED)]
            every.append(pytest.param(case, features, marks=[] if quick else pytest.mark.slow, id=f"{case}: {', '.join(features)}"))
    return every


@pytest.mark.parametrize("case, features", combinations())
def test_the_same_tokens(case, features):
    check(case, features)


@pytest.mark.parametrize(
    "case, size", [pytest.param(c, n, marks=() if (c, n) == ("llama_gqa", 4) else pytest.mark.slow) for c in CASES for n in (1, 2, 4, 8)]
)
def test_tensor_parallel_with_preemption_and_prefix_cache(case, size):
    options = PLAIN | dict(enable_prefix_caching=True, max_num_batched_tokens=16, num_pages=LENGTH // 4 + 4, scan_layers=True)
    llm = LLM(MODELS / case, **options, tensor_parallel_size=size, warmup=False)
    for _ in range(2):
        assert [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)] == generated(case)
    assert llm.engine.scheduler.num_preemptions > 0
    assert llm.engine.pool.num_free == llm.engine.pool.capacity
