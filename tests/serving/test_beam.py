"""Beam search against transformers, and against vLLM's definition written plainly, one whole request for each beam at each step."""

import asyncio
import json
import math

import pytest
from golden_cases import FOLDER, LENGTH, MODELS, generated, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxllm.errors import RequestError
from jaxllm.serving.beam import BeamSearch
from jaxllm.serving.news import figures_of
from jaxllm.serving.request import Logprob

OPTIONS = dict(dtype="float32", max_num_seqs=6, max_num_batched_tokens=16, page_size=4, max_model_len=LENGTH, skip_tokenizer_init=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
BEAMS = json.loads((FOLDER / "beams.json").read_text())


def prompts(case):
    return [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(case)]


def plain_beam_search(likeliest, prompt, width, max_tokens, penalty, ends, eos):
    """`likeliest(tokens, k)`: {token: logprob}. Returns (tokens, sum of log-probabilities), the best first."""

    def score(beam):
        tokens, total = beam
        return total / max(1, len(tokens) - (tokens[-1] in eos)) ** penalty

    live, finished = [(list(prompt), 0.0)], []
    for _ in range(max_tokens):
        grown = [([*t, token], total + logprob) for t, total in live for token, logprob in likeliest(t, 2 * width).items()]
        finished += [beam for beam in grown if beam[0][-1] in ends]
        live = sorted((beam for beam in grown if beam[0][-1] not in ends), key=score, reverse=True)[:width]
        if not live:
            break
    return sorted(finished + live, key=score, reverse=True)[:width]


@pytest.mark.parametrize("case,pool", [("gemma3_text_5to1", 60), ("gemma3_text_5to1", 20), ("llama_gqa", 20), ("mistral", 18)])
def test_as_transformers_does_it(case, pool):
    """All prompts together, beside other requests; in the small pools beams are thrown out, and lose their sources."""
    llm = LLM(MODELS / case, **OPTIONS, num_pages=pool)
    n = 2 if pool == 18 else 4
    beams = SamplingParams(use_beam_search=True, beam_width=4, n=n, temperature=0, max_tokens=12, ignore_eos=True, length_penalty=0.0)
    outputs = llm.generate(prompts(case) * 2, [beams] * 3 + [GREEDY] * 3)
    for output, reference in zip(outputs[:3], BEAMS[case], strict=True):
        assert [o.token_ids for o in output.outputs] == reference["tokens"][:n]
        assert [o.cumulative_logprob for o in output.outputs] == pytest.approx(reference["scores"][:n], abs=1e-3)
        assert output.finished and all(len(o.logprobs) == 12 for o in output.outputs)
    assert [o.outputs[0].token_ids for o in outputs[3:]] == [tokens[:12] for tokens in generated(case)]
    engine = llm.engine
    assert (engine.scheduler.num_preemptions > 0) == (pool < 60) and engine.runner.stats.compiles_after_warmup == 0
    assert engine.pool.num_free == engine.pool.capacity and not engine.scheduler.has_work and not engine._completions


@pytest.fixture(scope="module")
def llm():
    return LLM(MODELS / "llama_gqa", **OPTIONS, warmup=False)


def likeliest(llm):
    def of(tokens, k):
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=k, ignore_eos=True)
        logprobs = llm.generate({"prompt_token_ids": tokens}, params)[0].outputs[0].logprobs[0]
        return {token: entry.logprob for token, entry in logprobs.items()}

    return of


@pytest.mark.parametrize("width,penalty,ends", [(1, 1.0, ()), (3, 1.0, (105, 18)), (3, 8.0, (18, 127)), (9, -2.0, range(0, 128, 9))])
def test_as_vllm_defines_it(llm, width, penalty, ends):
    """With ends of text, whose length counts for a stop token and not for the end of sequence; and more beams than places."""
    for prompt in prompts("llama_gqa")[:2]:
        ids = prompt["prompt_token_ids"]
        params = SamplingParams(
            use_beam_search=True, beam_width=width, n=width, temperature=0, max_tokens=7, length_penalty=penalty, stop_token_ids=list(ends)
        )
        eos = llm.engine.eos_token_ids
        expected = plain_beam_search(likeliest(llm), ids, width, 7, penalty, {*ends, *eos}, eos)
        got = llm.generate(prompt, params)[0].outputs
        assert [ids + o.token_ids for o in got] == [tokens for tokens, _ in expected]
        assert [o.cumulative_logprob for o in got] == pytest.approx([total for _, total in expected], abs=1e-4)
        for o in got:
            last = o.token_ids[-1]
            assert o.finish_reason == ("stop" if last in {*ends, *eos} else "length")
            assert o.stop_reason == (last if last in ends and last not in eos else None)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0, 3.0, -1.0]))
def test_any_logprobs(data, width, max_tokens, penalty):
    vocab = data.draw(st.integers(2 * width, 12))
    ends = data.draw(st.sets(st.integers(0, vocab - 1)))
    eos = data.draw(st.sets(st.sampled_from(sorted(ends)))) if ends else set()
    salt = data.draw(st.integers(0, 10**6))
    prompt = [1] * data.draw(st.integers(1, 5))

    def of(tokens, k):
        scores = {t: -math.log(1 + hash((salt, t, *tokens)) % 10_007) for t in range(vocab)}
        return {t: scores[t] for t in sorted(scores, key=scores.get, reverse=True)[:k]}

    search = BeamSearch(width, max_tokens, penalty, num_prompt=len(prompt), ends=ends, eos=eos, n=width)
    while not search.over:
        done = [
            search.add(i, i, {t: Logprob(p) for t, p in of(prompt + beam.token_ids, 2 * width).items()})
            for i, beam in reversed(list(enumerate(search.live)))
        ]
        assert done == [False] * (len(done) - 1) + [True]
        search.advance()
    expected = plain_beam_search(of, prompt, width, max_tokens, penalty, ends, eos)
    assert [(prompt + beam.token_ids, beam.cumulative_logprob) for beam in search.best()] == expected


def test_beams_share_pages(llm):
    """Each step computes one token a beam, although nothing is found in the prefix cache."""
    llm.reset_prefix_cache()
    steps, prepare = [], llm.engine.runner.prepare
    llm.engine.runner.prepare = lambda plan, completions: steps.append(plan) or prepare(plan, completions)
    try:
        llm.beam_search(prompts("llama_gqa")[2], BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True))
    finally:
        llm.engine.runner.prepare = prepare
    assert sum(plan.num_tokens for plan in steps) == 40 + 9 * 4
    assert sum(len(plan.copies) for plan in steps) >= 5 * 4  # those that do not begin a page


def test_the_beam_search_call(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True, length_penalty=0.0)
    output = llm.beam_search(prompts("llama_gqa")[:1], params)[0]
    ids = prompts("llama_gqa")[0]["prompt_token_ids"]
    assert [s.tokens for s in output.sequences] == [ids + tokens for tokens in BEAMS["llama_gqa"][0]["tokens"]]
    assert [s.cum_logprob for s in output.sequences] == pytest.approx(BEAMS["llama_gqa"][0]["scores"], abs=1e-3)
    with pytest.raises(RequestError, match="params must be BeamSearchParams, not SamplingParams"):
        llm.beam_search(prompts("llama_gqa"), GREEDY)
    with pytest.raises(RequestError, match="temperature must be 0 for beam search"):
        BeamSearchParams(beam_width=2, max_tokens=3, temperature=0.5)
    with pytest.raises(RequestError, match="beam_width must be a whole number of at least 1, not 0"):
        BeamSearchParams(beam_width=0, max_tokens=3)
    with pytest.raises(RequestError, match="beam_width=11 needs the 22 likeliest tokens of each step, and max_logprobs=20"):
        llm.beam_search(prompts("llama_gqa"), BeamSearchParams(beam_width=11, max_tokens=3))
    with pytest.raises(RequestError, match="max_model_len=72"):
        llm.beam_search(prompts("llama_gqa"), BeamSearchParams(beam_width=2, max_tokens=60))
    assert not llm.engine.has_work and not llm.engine.scheduler.has_work


def test_leaving_in_the_middle():
    """A search is aborted in every state it can be in, through the asynchronous API, and one goes on beside it."""
    llm = AsyncLLM(MODELS / "llama_gqa", **OPTIONS, num_pages=30)
    params = BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True, length_penalty=0.0).sampling_params()

    async def last(i):
        return [o async for o in llm.generate(prompts("llama_gqa")[i], params)]

    async def run():
        stays = asyncio.create_task(last(2))
        for i in range(20):
            task = asyncio.create_task(last(i % 2))
            await asyncio.sleep(0.004 * i)
            task.cancel()
        outputs = await stays
        assert len(outputs) == 1 and [o.token_ids for o in outputs[0].outputs] == BEAMS["llama_gqa"][2]["tokens"]
        while (await llm.ask(figures_of)).requests:
            await asyncio.sleep(0.01)

    try:
        asyncio.run(run())
        engine = llm.engine
        assert not engine.scheduler.has_work and not engine._completions and engine.pool.num_free == engine.pool.capacity
    finally:
        llm.shutdown()
