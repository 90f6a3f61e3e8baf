"""The asynchronous API: the same tokens, nothing lost, nothing leaked, whoever leaves and whenever."""

import asyncio
import random
import threading

import pytest
from golden_cases import MODELS, generated, golden

from jaxllm import AsyncLLM, SamplingParams
from jaxllm.errors import ConfigError, RequestError
from jaxllm.serving import EngineDeadError
from jaxllm.serving.news import figures_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CASE = "llama_gqa"
OPTIONS = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, page_size=4, max_model_len=80, skip_tokenizer_init=True)
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(CASE)]


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def llm(request):
    engine = AsyncLLM(MODELS / CASE, max_pending=8, engine_process=request.param, **OPTIONS)
    yield engine
    engine.shutdown()


async def last(outputs):
    return [output async for output in outputs][-1]


async def settled(llm):
    """Aborts reach the engine's thread a moment later."""
    while (await llm.ask(figures_of)).requests:
        await asyncio.sleep(0.01)
    now = await llm.ask(figures_of)
    assert now.free_pages == now.pages and not llm._streams and llm._pending == 0


def test_the_same_tokens_as_alone_and_more_at_each_turn(llm):
    async def one(i):
        seen = []
        async for output in llm.generate(PROMPTS[i], GREEDY):
            tokens = output.outputs[0].token_ids
            assert tokens[: len(seen)] == seen and len(tokens) > len(seen)
            seen = tokens
        assert output.finished
        return seen

    async def all_of_them():
        results = await asyncio.gather(*(one(i % 3) for i in range(12)))  # more than may be pending
        await settled(llm)
        return results

    assert asyncio.run(all_of_them()) == [generated(CASE)[i % 3] for i in range(12)]


def test_random_departures_leak_nothing_and_harm_nobody(llm):
    rng = random.Random(0)
    counts = {"finished": 0, "left": 0, "cancelled": 0}

    async def one(i):
        how = rng.choice(["stay", "leave", "cancel", "slow"])
        stream = llm.generate(PROMPTS[i % 3], GREEDY)
        if how == "cancel":
            task = asyncio.create_task(last(stream))
            await asyncio.sleep(rng.random() * 0.2)
            counts["cancelled"] += task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
                raise asyncio.CancelledError  # it had finished before
            return
        async for output in stream:
            if how == "leave" and len(output.outputs[0].token_ids) > i % 20:
                counts["left"] += 1
                break
            if how == "slow":
                await asyncio.sleep(0.01)
        await stream.aclose()
        if output.finished:
            assert output.outputs[0].token_ids == generated(CASE)[i % 3]
            counts["finished"] += 1

    async def all_of_them():
        await asyncio.gather(*(one(i) for i in range(60)))
        await settled(llm)

    asyncio.run(all_of_them())
    assert min(counts.values()) > 0, counts


def test_those_who_leave_before_they_are_added_harm_nobody(llm):
    """The engine's thread finds them cancelled when it comes to them."""

    async def run():
        for delay in (0, 0, 0.001, 0.002):
            stays = asyncio.create_task(last(llm.generate(PROMPTS[0], GREEDY)))
            tasks = [asyncio.create_task(last(llm.generate(PROMPTS[1], GREEDY))) for _ in range(5)]
            await asyncio.sleep(delay)
            [task.cancel() for task in tasks]
            assert (await stays).outputs[0].token_ids == generated(CASE)[0]
        await settled(llm)

    asyncio.run(run())


def test_several_event_loops(llm):
    results = {}

    def loop(i):
        results[i] = asyncio.run(last(llm.generate(PROMPTS[i], GREEDY))).outputs[0].token_ids

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert results == dict(enumerate(generated(CASE)))


def test_a_bad_request_is_its_own_alone(llm):
    async def run():
        good = asyncio.create_task(last(llm.generate(PROMPTS[0], GREEDY, request_id="mine")))
        await asyncio.sleep(0.05)
        for bad in ({"prompt_token_ids": []}, {"prompt_token_ids": [10**6]}, {"prompt_token_ids": [1] * 80}, "text", {"promt": "x"}):
            with pytest.raises(RequestError):
                await last(llm.generate(bad, GREEDY))
        assert (await good).outputs[0].token_ids == generated(CASE)[0]
        streams = [llm.generate(PROMPTS[0], GREEDY, request_id="twice") for _ in range(2)]
        results = await asyncio.gather(*map(last, streams), return_exceptions=True)  # added together, before a step is taken
        assert sorted(type(r) is RequestError and "'twice' already" in str(r) for r in results) == [False, True]
        await settled(llm)

    asyncio.run(run())


def test_the_end():
    with pytest.raises(ConfigError, match="max_pending"):
        AsyncLLM(MODELS / CASE, max_pending=0, **OPTIONS)

    async def run(llm, end):
        waiting = asyncio.create_task(last(llm.generate(PROMPTS[2], GREEDY)))
        await asyncio.sleep(0.05)
        end()
        with pytest.raises(EngineDeadError):
            await waiting
        with pytest.raises(EngineDeadError):
            await last(llm.generate(PROMPTS[0], GREEDY))

    llm = AsyncLLM(MODELS / CASE, warmup=False, **OPTIONS)  # it is still compiling when it is stopped
    asyncio.run(run(llm, llm.shutdown))
    llm.shutdown()
    broken = AsyncLLM(MODELS / CASE, warmup=False, **OPTIONS)

    def breaks(*_):
        raise MemoryError("the device is gone")

    broken.engine.runner.launch = breaks
    asyncio.run(run(broken, lambda: None))
    with pytest.raises(EngineDeadError, match="device is gone"):
        asyncio.run(last(broken.generate(PROMPTS[0], GREEDY)))
