"""Host memory behind the KV cache: pages that are given up come back, and change no token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import LENGTH, MODELS, golden

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.serving.replay import replay

CASE = MODELS / "llama_gqa"
OPTIONS = dict(dtype="float32", page_size=4, max_model_len=LENGTH, skip_tokenizer_init=True, compilation_cache_dir="")
SMALL = OPTIONS | dict(max_num_seqs=3, max_num_batched_tokens=16, num_pages=LENGTH // 4 + 6)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
POLICIES = {
    "mlfq": dict(first_quantum_s=0.005, starvation_s=5.0),
    "adaptive": dict(review_s=1e-3, margin=0.0, most_s=1.0, seniority=0.0),
    "priority_preempt": {},
}


PROMPT = {"prompt_token_ids": golden("llama_gqa")[2]["prompt"].tolist()}


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[list[int]], list[SamplingParams], list[list[int]]]:
    """Prompts, parameters, and what is drawn where all have room."""
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, 90, rng.integers(4, LENGTH - 32)).tolist() for _ in range(80)]
    params = [SamplingParams(seed=i, max_tokens=int(rng.integers(8, 33)), ignore_eos=True) for i in range(80)]
    llm = LLM(CASE, **OPTIONS, max_num_seqs=8, max_num_batched_tokens=64, warmup=False)
    outputs = llm.generate([{"prompt_token_ids": t} for t in tokens], params)
    assert llm.engine.scheduler.num_preemptions == 0
    return tokens, params, [o.outputs[0].token_ids for o in outputs]


@pytest.mark.parametrize("policy", POLICIES)
def test_hundreds_of_preemptions_change_no_token(policy, undisturbed, tmp_path):
    tokens, params, expected = undisturbed
    record = str(tmp_path / "record.jsonl")
    options = dict(scheduling_policy=policy, scheduling_policy_options=POLICIES[policy], record=record)
    engine = LLM(CASE, **SMALL, **options, warmup=policy == "mlfq", host_kv_bytes=1 << 20).engine
    outputs, added = {}, 0
    while engine.has_work or added < len(tokens):  # they come while others run, so that there is who gives way
        if added < len(tokens) and engine.stats.steps >= 4 * added:
            priority = 5 - added % 6 if policy == "priority_preempt" else 0
            engine.add_request(tokens[added], dataclasses.replace(params[added], priority=priority), request_id=str(added))
            added += 1
        outputs |= {int(o.request_id): o.outputs[0].token_ids for o in engine.step() if o.finished}
    assert [outputs[i] for i in range(len(tokens))] == expected
    moved = engine.runner.host_pages.stats
    assert engine.scheduler.num_preemptions > (100 if policy == "mlfq" else 30), "the clock has a say in how many"
    assert moved.saved > 100 and moved.fetched > 100
    assert engine.runner.stats.compiles_after_warmup == 0 and engine.pool.num_free == engine.pool.capacity
    engine.close()
    assert replay(record).plans > 300


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}, {"kv_cache_dtype": "fp8"}, {"scan_layers": True}], ids=str)
def test_a_beginning_that_was_given_up_is_not_computed_again(options):
    """The same prompt before and after others have taken all pages, sampled with a seed, and logprobs to the last bit."""
    llm = LLM(CASE, **SMALL, **options, warmup=False, host_kv_bytes=1 << 20)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True, logprobs=2)
    [first] = llm.generate([PROMPT], params)
    rng = np.random.default_rng(0)
    llm.generate([{"prompt_token_ids": rng.integers(0, 90, 40).tolist()} for _ in range(4)], GREEDY)
    saved = llm.engine.runner.host_pages.stats.saved
    [again] = llm.generate([PROMPT], params)
    assert saved > 0 and llm.engine.runner.host_pages.stats.fetched > 5
    assert first.num_cached_tokens == 0 and again.num_cached_tokens == (len(first.prompt_token_ids) - 1) // 4 * 4
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert again.outputs[0].cumulative_logprob == first.outputs[0].cumulative_logprob
    llm.engine.reset_prefix_cache()
    assert llm.generate([PROMPT], params)[0].num_cached_tokens == 0


def test_the_budget_is_kept():
    llm = LLM(CASE, **SMALL, warmup=False, host_kv_bytes=20_000)
    pool, page = llm.engine.pool, llm.engine.runner.host_pages.page_bytes
    assert pool.host_pages == 20_000 // page
    rng = np.random.default_rng(0)
    llm.generate([{"prompt_token_ids": rng.integers(0, 90, 40).tolist()} for _ in range(8)], GREEDY)
    assert llm.engine.runner.host_pages.stats.saved > 2 * pool.host_pages and len(pool.host) == pool.host_pages


def test_more_pages_than_are_moved_at_a_time():
    llm = LLM(CASE, **SMALL | dict(num_pages=80), warmup=False, host_kv_bytes=1 << 20)
    store = llm.engine.runner.host_pages
    rng = np.random.default_rng(0)
    kv_pages = jax.device_put(rng.normal(size=llm.engine.runner.state.kv_pages.shape).astype(np.float32))
    whole = np.asarray(kv_pages).reshape(-1, 81, *kv_pages.shape[1:])
    program = lambda kind, size: store.compile(kind, size)
    pages = list(range(1, 80))
    kv_pages = store.move(program, kv_pages, [(page, page - 1) for page in pages], [])
    assert max(store.sizes) < len(pages), "in parts"
    kv_pages = store.move(program, kv_pages, [], [(page - 1, 81 - page) for page in pages])
    moved = np.asarray(kv_pages).reshape(-1, 81, *kv_pages.shape[1:])
    for page in pages:
        np.testing.assert_array_equal(moved[:, 81 - page], whole[:, page])


def test_what_moves_cost_is_counted():
    llm = LLM(CASE, **SMALL, warmup=False, host_kv_bytes=1 << 20)
    runner, store = llm.engine.runner, llm.engine.runner.host_pages
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(0, 90, 40).tolist()} for _ in range(6)]
    llm.generate(prompts + prompts, GREEDY)
    stats = store.stats
    assert stats.saved > 0 and stats.fetched > 0 and 0 <= stats.exposed_s <= stats.host_s
    moves = {kind: sum(size * n for (k, size), n in stats.moves.items() if k == kind) for kind in ("save", "fetch")}
    assert moves["save"] >= stats.saved and moves["fetch"] >= stats.fetched
    before = np.asarray(runner.state.kv_pages).reshape(-1, llm.engine.pool.num_pages, *runner.state.kv_pages.shape[1:])[:, 1:]
    seconds, runner.state.kv_pages = store.device_s(lambda kind, size: runner._program((kind, size)), runner.state.kv_pages)
    after = np.asarray(runner.state.kv_pages).reshape(before.shape[0], -1, *before.shape[2:])[:, 1:]
    assert seconds > 0
    np.testing.assert_array_equal(after, before)


def test_a_device_that_has_nothing_to_do_is_told_from_one_that_has():
    """A copy after a long computation is hidden behind it; the same copy alone is not."""
    llm = LLM(CASE, **SMALL, warmup=False, host_kv_bytes=1 << 20)
    store, kv_pages = llm.engine.runner.host_pages, llm.engine.runner.state.kv_pages
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, m: m @ m / 600, jnp.ones((600, 600)))[0, 0] * 0 + x)
    jax.block_until_ready((long(kv_pages), kv_pages))
    program = {("save", 1): store.compile("save", 1)}
    of = lambda kind, size: program[kind, size]
    store.move(of, kv_pages, [(1, 0)], [])
    alone = store.stats.exposed_s
    assert alone > 0
    store.move(of, long(kv_pages), [(2, 1)], [])
    assert store.stats.exposed_s == alone and store.stats.host_s > alone


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(host_kv_bytes=-1), "host_kv_bytes must be a number of bytes"),
        (dict(host_kv_bytes=100), "less than one page"),
        (dict(host_kv_bytes=1 << 60), "more than the .* bytes of host memory"),
        (dict(host_kv_bytes=1 << 20, enable_prefix_caching=False), "needs enable_prefix_caching"),
        (dict(host_kv_bytes=1 << 20, model=MODELS / "llama_rope_dynamic"), "depend on the length"),
    ],
    ids=str,
)
def test_refusals(options, message):
    options = dict(options)
    with pytest.raises(ConfigError, match=message):
        LLM(options.pop("model", CASE), **SMALL, warmup=False, **options)
