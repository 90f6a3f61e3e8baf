"""Several completions of a prompt: each has the tokens of a request of its own, though they share pages and copy the last."""

import asyncio

import pytest
from golden_cases import LENGTH, MODELS, generated, golden

from jaxllm import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxllm.errors import ConfigError, RequestError
from jaxllm.serving.request import completion_seed

pytestmark = pytest.mark.usefixtures("compiled_quickly")

OPTIONS = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, page_size=4, max_model_len=LENGTH, skip_tokenizer_init=True)
SAMPLED = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=32, ignore_eos=True)
LIKELIEST = SAMPLED.replace(top_k=1)  # three times what transformers' greedy search gives


def prompts(case):
    return [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(case)]


def tokens(output):
    assert output.finished and [o.index for o in output.outputs] == list(range(len(output.outputs)))
    return [o.token_ids for o in output.outputs]


# Chunked prompts, the prefix cache and sliding windows shorter than what is shared; the last without the cache.
@pytest.mark.parametrize(
    "pool,case,caching",
    [("roomy", "gemma3_text_5to1", True)]
    + [("tiny", *c) for c in (("gemma3_text_5to1", True), ("mistral", True), ("llama_rope_dynamic", True), ("llama_gqa", False))],
)
def test_the_same_tokens_as_alone(pool, case, caching):
    """In the tiny pool completions are thrown out, and those that come back find their source gone or at another place."""
    llm = LLM(MODELS / case, **OPTIONS, enable_prefix_caching=caching, num_pages=LENGTH // 4 + (60 if pool == "roomy" else 5))
    engine = llm.engine
    together = llm.generate(prompts(case), LIKELIEST)
    assert [tokens(o) for o in together] == [[golden_tokens] * 3 for golden_tokens in generated(case)]
    sampled = llm.generate(prompts(case), SAMPLED)
    for output, prompt in zip(sampled, prompts(case), strict=True):
        alone = [llm.generate(prompt, SAMPLED.replace(n=1, seed=completion_seed(7, i)))[0] for i in range(3)]
        assert tokens(output) == [o.outputs[0].token_ids for o in alone]
        assert len({tuple(t) for t in tokens(output)}) == 3
    assert (engine.scheduler.num_preemptions > 0) == (pool == "tiny")
    assert engine.runner.stats.compiles_after_warmup == 0
    assert engine.pool.num_free == engine.pool.capacity and not engine.scheduler.has_work


def test_pages_are_copied_on_every_device():
    llm = LLM(MODELS / "llama_gqa", **OPTIONS, tensor_parallel_size=2, scan_layers=True, warmup=False)
    assert tokens(llm.generate(prompts("llama_gqa")[1], LIKELIEST)[0]) == [generated("llama_gqa")[1]] * 3


@pytest.fixture(scope="module")
def llm():
    return LLM(MODELS / "llama_gqa", **OPTIONS, scheduling_policy="priority", warmup=False)


def test_prompts_are_computed_once(llm):
    prompt = prompts("llama_gqa")[2]  # 40 tokens
    llm.engine.add_request(prompt["prompt_token_ids"], SAMPLED.replace(n=4), cache_salt="nobody else's")
    engine, computed, copies, launch = llm.engine, 0, 0, llm.engine.runner.prepare

    def prepare(plan, completions):
        nonlocal computed, copies
        computed, copies = computed + plan.num_tokens, copies + len(plan.copies)
        return launch(plan, completions)

    engine.runner.prepare = prepare
    try:
        while engine.has_work:
            engine.step()
    finally:
        engine.runner.prepare = launch
    assert computed == 40 + 31 + 3 * 32 and copies == 3  # 39 tokens are shared, 3 of them in pages that are copied


def test_streams_show_all_completions_and_stops_are_each_ones_own(llm):
    prompt = prompts("llama_gqa")[1]
    whole = tokens(llm.generate(prompt, SAMPLED)[0])
    stop = next(t for t in whole[1] if t not in whole[0] + whole[2])
    seen = [0, 0, 0]
    for output in llm.stream(prompt, SAMPLED.replace(stop_token_ids=[stop])):
        lengths = [len(o.token_ids) for o in output.outputs]
        assert all(new >= old for new, old in zip(lengths, seen, strict=True)) and lengths != seen
        seen = lengths
    cut = whole[1][: whole[1].index(stop) + 1]
    assert tokens(output) == [whole[0], cut, whole[2]]
    assert [o.finish_reason for o in output.outputs] == ["length", "stop", "length"]
    assert [o.stop_reason for o in output.outputs] == [None, stop, None]


def test_leaving_frees_all_completions(llm):
    stream = llm.stream(prompts("llama_gqa")[2], SAMPLED.replace(n=9))  # more than can run at a time
    for _ in range(5):
        next(stream)
    stream.close()
    engine = llm.engine
    assert not engine.has_work and not engine.scheduler.has_work and engine.pool.num_free == engine.pool.capacity


def test_more_completions_than_places(llm):
    output = llm.generate(prompts("llama_gqa")[0], LIKELIEST.replace(n=9))[0]
    assert tokens(output) == [generated("llama_gqa")[0]] * 9


def test_salts_share_nothing(llm):
    ids = prompts("llama_gqa")[2]["prompt_token_ids"]
    one = SAMPLED.replace(n=1, max_tokens=8)
    cached = lambda salt: llm.generate({"prompt_token_ids": ids, **salt}, one)[0].num_cached_tokens
    llm.reset_prefix_cache()
    assert [cached({"cache_salt": "a"}), cached({"cache_salt": "b"}), cached({})] == [0, 0, 0]
    assert [cached({"cache_salt": "a"}), cached({"cache_salt": "b"}), cached({})] == [36, 36, 36]
    longer = {"prompt_token_ids": ids + llm.generate(prompts("llama_gqa")[2], one)[0].outputs[0].token_ids, "cache_salt": "a"}
    assert llm.generate(longer, one)[0].num_cached_tokens == 44  # what was generated has the salt too
    llm.reset_prefix_cache()
    assert cached({"cache_salt": "a"}) == 0
    for bad in ("", 5, b"x"):
        with pytest.raises(RequestError, match="cache_salt must be a string"):
            cached({"cache_salt": bad})
    with pytest.raises(RequestError, match="a prompt is a string"):
        llm.generate({"cache_salt": "a"})


def test_priority(llm):
    """Six requests for four places, the most urgent last."""
    prompt, order = prompts("llama_gqa")[0]["prompt_token_ids"], []
    for i in range(6):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, priority=-i)
        llm.engine.add_request(prompt, params, request_id=f"p{i}")
    while llm.engine.has_work:
        order += [o.request_id for o in llm.engine.step() if o.finished]
    assert set(order[:4]) == {"p5", "p4", "p3", "p2"} and set(order[4:]) == {"p1", "p0"}


def test_refusals():
    with pytest.raises(RequestError, match="n must be 1 with temperature=0"):
        SAMPLED.replace(temperature=0)
    with pytest.raises(ConfigError, match="scheduling_policy must be fcfs or .*, not 'lifo'"):
        EngineConfig(model="demo", scheduling_policy="lifo")


def test_async():
    """Also: under fcfs a priority is refused, and the others go on."""
    llm = AsyncLLM(MODELS / "llama_gqa", **OPTIONS)

    async def last(prompt, params):
        return [o async for o in llm.generate(prompt, params)][-1]

    async def run():
        requests = [last(p, LIKELIEST) for p in prompts("llama_gqa")]
        *good, bad = await asyncio.gather(*requests, last([1], SAMPLED.replace(priority=1)), return_exceptions=True)
        assert [tokens(o) for o in good] == [[golden_tokens] * 3 for golden_tokens in generated("llama_gqa")]
        assert isinstance(bad, RequestError)
        with pytest.raises(RequestError, match="priority=1 .* scheduling_policy='fcfs'"):
            await last(prompts("llama_gqa")[0], SAMPLED.replace(priority=1))
        await llm.reset_prefix_cache()

    try:
        asyncio.run(run())
    finally:
        llm.shutdown()
