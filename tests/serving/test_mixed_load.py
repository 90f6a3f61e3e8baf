"""Every kind of request at once: nothing compiles, nothing is lost, nothing leaks, and nobody's tokens depend on it."""

import numpy as np
import pytest
from tiny_models import write_llama

from jaxllm import LLM
from jaxllm.launch.bench.mixed import PROCESSORS, MixedRequest, drive, features, mixed_load

OPTIONS = dict(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, page_size=4, scheduling_policy="priority")
# All there are but those that need nothing to be shown to work together with others.
EVERY = set(
    "max_tokens temperature top_k top_p min_p typical_p presence_penalty frequency_penalty repetition_penalty logit_bias "
    "allowed_token_ids bad_words min_tokens seed stop stop_token_ids include_stop_str_in_output ignore_eos skip_special_tokens "
    "logprobs prompt_logprobs n priority truncate_prompt_tokens use_beam_search beam_width length_penalty logits_processor".split()
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def run(model, num_requests, **lengths):
    """The engine after it, the requests, and what became of them."""
    llm = LLM(model, **OPTIONS, max_model_len=sum(lengths.values()), logits_processors=PROCESSORS, num_pages=sum(lengths.values()) // 4 + 9)
    engine, kv_use = llm.engine, llm.engine.scheduler.kv_use

    def checked():
        assert kv_use() == count_page_by_page(engine.scheduler)
        return kv_use()

    engine.scheduler.kv_use = checked
    requests = mixed_load(
        np.random.default_rng(5), num_requests, vocab_size=engine.vocab_size, tokenizer=engine.tokenizer, requests_per_step=0.5, **lengths
    )
    return engine, requests, drive(engine, requests)


def check(engine, requests, outcome):
    assert features(requests).keys() == EVERY  # a new parameter must be added to the load
    assert engine.runner.stats.compiles_after_warmup == 0
    assert engine.scheduler.num_preemptions > 0 and outcome.aborted
    assert not engine.has_work and not engine.scheduler.has_work and engine.pool.num_free == engine.pool.capacity
    assert not engine._completions and not engine._in_flight
    assert outcome.outputs.keys() | outcome.aborted == set(range(len(requests))) and not outcome.outputs.keys() & outcome.aborted
    for number, output in outcome.outputs.items():
        check_output(requests[number], output, engine)


def check_output(request, output, engine):
    """What each parameter promises that can be seen in the output."""
    p = request.params
    assert len(output.outputs) == p.n and [o.index for o in output.outputs] == list(range(p.n))
    assert output.prompt_token_ids == request.prompt_token_ids[-(p.truncate_prompt_tokens or 0) :]
    assert (output.prompt_logprobs is None) == (p.prompt_logprobs is None)
    if p.prompt_logprobs is not None:
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
        for token, places in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            assert token in places and p.prompt_logprobs <= len(places) <= p.prompt_logprobs + 1
    ends = set(p.stop_token_ids) | (set() if p.ignore_eos else engine.eos_token_ids)
    for o in output.outputs:
        assert 1 <= len(o.token_ids) <= p.max_tokens and o.finish_reason in ("stop", "length")
        assert not ends & set(o.token_ids[:-1]) and (o.finish_reason == "stop" or len(o.token_ids) == p.max_tokens)
        if p.use_beam_search:
            continue
        assert len(o.token_ids) >= p.min_tokens
        assert p.allowed_token_ids is None or set(o.token_ids) <= set(p.allowed_token_ids)
        assert (o.logprobs is None) == (p.logprobs is None)
        for token, places in zip(o.token_ids, o.logprobs or (), strict=o.logprobs is not None):
            assert token in places and p.logprobs <= len(places) <= p.logprobs + 1
            assert all(np.isfinite(place.logprob) and place.logprob <= 1e-5 for place in places.values())
        if not p.include_stop_str_in_output and not p.min_tokens:
            assert not any(stop in o.text for stop in p.stop)
        assert o.stop_reason is None or o.stop_reason in (*p.stop, *p.stop_token_ids)


def count_page_by_page(scheduler):
    """`Scheduler.kv_use`, from every page that any sequence holds."""
    size, held = scheduler.config.page_size, {}
    for sequence in [*scheduler.running, *scheduler._kept]:
        for i, page in enumerate(sequence.pages):
            held[page] = max(held.get(page, 0), min(size, max(0, sequence.num_computed - i * size)))
    return len(held) * size, len(held) * size - sum(held.values())


def check_alone(engine, requests, outcome, numbers):
    """Those with a seed, or greedy, have the tokens that they have alone in the engine."""
    for number in numbers:
        engine.reset_prefix_cache()
        again = drive(engine, [MixedRequest(0, requests[number].prompt_token_ids, requests[number].params)])
        assert [o.token_ids for o in again.outputs[0].outputs] == [o.token_ids for o in outcome.outputs[number].outputs], number


def test_120_requests(model):
    engine, requests, outcome = run(model, 120, max_input_len=150, max_output_len=32)
    check(engine, requests, outcome)
    assert 0 < engine.stats.kv_waste < 0.2
    reproducible = [n for n in outcome.outputs if requests[n].params.temperature == 0 or requests[n].params.seed is not None]
    check_alone(engine, requests, outcome, reproducible[:20])
    assert engine.runner.stats.compiles_after_warmup == 0


@pytest.mark.slow
def test_500_requests_of_up_to_1500_tokens(model):
    engine, requests, outcome = run(model, 500, max_input_len=1500, max_output_len=64)
    check(engine, requests, outcome)
    assert max(len(r.prompt_token_ids) for r in requests) > 1400 and min(len(r.prompt_token_ids) for r in requests) == 1
