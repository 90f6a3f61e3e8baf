"""Requests that begin alike share pages, and get the tokens that they would have had alone."""

import pytest
from golden_cases import LENGTH, MODELS, generated, golden
from hypothesis import given
from hypothesis import strategies as st

from jaxllm import LLM, SamplingParams
from jaxllm.serving.kv_cache import PagePool, page_names

pytestmark = pytest.mark.usefixtures("compiled_quickly")

OPTIONS = dict(dtype="float32", max_num_seqs=2, max_num_batched_tokens=16, page_size=4, max_model_len=LENGTH + 8)
OPTIONS |= dict(skip_tokenizer_init=True, warmup=False)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2", "gemma3_text"])
def test_cached_prompts_give_the_same_tokens(case):
    """Twice the same prompts, with sliding windows shorter than what is shared: the second time nearly all is there."""
    llm = LLM(MODELS / case, **OPTIONS)
    prompts = [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(case)]
    first, second = llm.generate(prompts, GREEDY), llm.generate(prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in second] == generated(case)
    assert [o.num_cached_tokens for o in first] == [0, 0, 0]
    assert [o.num_cached_tokens for o in second] == [4, 20, 36]  # whole pages, never the last token
    # What was generated is there too: a conversation goes on where it was.
    longer = {"prompt_token_ids": prompts[2]["prompt_token_ids"] + generated(case)[2][:20]}
    output = llm.generate(longer, GREEDY.replace(max_tokens=12))[0]
    assert output.outputs[0].token_ids == generated(case)[2][20:] and output.num_cached_tokens == 56
    assert llm.engine.pool.num_free == llm.engine.pool.capacity
    llm.engine.reset_prefix_cache()
    assert llm.generate(prompts[2], GREEDY.replace(max_tokens=1))[0].num_cached_tokens == 0


def test_sharing_while_running_and_under_preemption():
    """The same prompt many times over, in a pool for little more than one: shared, thrown out, found again."""
    case = "llama_gqa"
    llm = LLM(MODELS / case, **{**OPTIONS, "max_num_seqs": 4, "max_model_len": LENGTH}, num_pages=LENGTH // 4 + 6)
    prompt = {"prompt_token_ids": golden(case)[2]["prompt"].tolist()}
    outputs = llm.generate([prompt] * 6, GREEDY)
    assert all(o.outputs[0].token_ids == generated(case)[2] for o in outputs)
    assert llm.engine.scheduler.num_preemptions > 0
    assert llm.engine.pool.num_free == llm.engine.pool.capacity


def test_off_and_where_keys_depend_on_length():
    for case, options in (("llama_gqa", {"enable_prefix_caching": False}), ("llama_rope_dynamic", {})):
        llm = LLM(MODELS / case, **OPTIONS, **options)
        prompt = {"prompt_token_ids": golden(case)[1]["prompt"].tolist()}
        outputs = [llm.generate(prompt, GREEDY.replace(max_tokens=4))[0] for _ in range(2)]
        assert [o.num_cached_tokens for o in outputs] == [0, 0]
        assert outputs[1].outputs[0].token_ids == generated(case)[1][:4]


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_names_agree_exactly_where_everything_before_does(a, b, size):
    names = [page_names(tokens, size) for tokens in (a, b)]
    assert [len(n) for n in names] == [len(a) // size, len(b) // size]
    for i, (one, other) in enumerate(zip(*names, strict=False)):
        assert (one == other) == (a[: (i + 1) * size] == b[: (i + 1) * size])
    for cut in range(0, len(a) // size + 1):
        first = page_names(a[: cut * size], size)
        assert first + page_names(a[cut * size :], size, first[-1] if first else b"") == names[0]


def test_the_page_used_longest_ago_goes_first():
    pool = PagePool(5)
    pages = pool.take(4)
    for page, name in zip(pages, (b"a", b"b", b"c", b"d"), strict=True):
        pool.publish(page, name)
    pool.give_back(pages)  # the last of the sequence is the first to go
    assert pool.num_free == 4 and pool.find([b"a", b"b", b"c", b"d"]) == pages
    assert pool.take(1) == [pages[3]] and pool.find([b"a", b"b", b"c", b"d"]) == pages[:3]
    pool.share(pages[:1])
    assert pool.num_free == 2 and set(pool.take(2)) == set(pages[1:3])
    assert pool.find([b"a"]) == pages[:1]
