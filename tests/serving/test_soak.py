"""Thousands of short requests from several event loops, with readers who leave at any moment: each who stays is answered once and
rightly, and nothing piles up."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter

import psutil
import pytest
from tiny_models import write_llama

from jaxllm import AsyncLLM, SamplingParams
from jaxllm.serving.news import figures_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")

OPTIONS = dict(dtype="float32", max_num_seqs=8, max_num_batched_tokens=32, page_size=4, max_model_len=64, skip_tokenizer_init=True)
LOOPS, TOGETHER = 4, 24  # event loops, and requests at a time in each
KINDS = [
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=8, ignore_eos=True),
    SamplingParams(seed=4, max_tokens=4, n=2, presence_penalty=1.0),
    SamplingParams(seed=5, max_tokens=3, logprobs=2, logit_bias={5: 3.0}),
]
rng = random.Random(0)
PROMPTS = [[rng.randrange(3, 128) for _ in range(rng.randint(1, 40))] for _ in range(40)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    llm = AsyncLLM(write_llama(tmp_path_factory.mktemp("model") / "tiny"), max_pending=80, num_pages=40, **OPTIONS)
    yield llm
    llm.shutdown()


def tokens(output):
    return [o.token_ids for o in output.outputs]


async def last(stream):
    return [output async for output in stream][-1]


async def alone(llm):
    """What each prompt gives with each kind of parameters, one at a time."""
    return {
        (p, k): tokens(await last(llm.generate({"prompt_token_ids": prompt}, params)))
        for p, prompt in enumerate(PROMPTS)
        for k, params in enumerate(KINDS)
    }


class Client:
    """One event loop's requests. `ends`: how many ended in which way."""

    def __init__(self, llm, number, num_requests, expected, ends):
        self.llm, self.expected, self.ends = llm, expected, ends
        self.random, self.left = random.Random(number), num_requests
        self.errors = []

    def run(self):
        try:
            asyncio.run(self.all_of_them())
        except BaseException as error:
            self.errors.append(error)

    async def all_of_them(self):
        await asyncio.gather(*(self.worker() for _ in range(TOGETHER)))

    async def worker(self):
        while self.left > 0 and not self.errors:
            self.left -= 1
            how = self.random.choices(["stay", "leave", "cancel"], [6, 2, 2])[0]
            which = self.random.randrange(len(PROMPTS)), self.random.randrange(len(KINDS))
            if how != "cancel":
                self.ends[await self.read(which, self.random.randrange(6) if how == "leave" else None)] += 1
                continue
            task = asyncio.create_task(self.read(which, None))
            await asyncio.sleep(self.random.random() * 0.03)
            task.cancel()
            try:
                self.ends[await task] += 1  # it was over already
            except asyncio.CancelledError:
                self.ends["cancelled"] += 1

    async def read(self, which, most):
        """Reads a request's outputs, or so many of them. How it ended."""
        finished, seen = 0, []
        stream = self.llm.generate({"prompt_token_ids": PROMPTS[which[0]]}, KINDS[which[1]])
        async for output in stream:
            assert not finished, "an output came after the last"
            assert all(new[: len(old)] == old for new, old in zip(tokens(output), seen, strict=False)), "tokens were taken back"
            seen, finished = tokens(output), output.finished
            if most is not None and (most := most - 1) < 0 and not finished:
                await stream.aclose()
                return "left"
        assert finished and seen == self.expected[which], (which, seen, self.expected[which])
        return "answered"


def settle(llm):
    """Aborts reach the engine's thread a moment later."""
    deadline = time.monotonic() + 30
    while asyncio.run(llm.ask(figures_of)).requests:
        assert time.monotonic() < deadline, "the engine is not done"
        time.sleep(0.01)


def check_nothing_is_left(llm):
    engine = llm.engine
    assert engine.pool.num_free == engine.pool.capacity and not engine.scheduler.has_work
    assert not llm._streams and not llm._queue and not llm._pending
    assert not engine._requests and not engine._completions
    assert engine.runner.stats.compiles_after_warmup == 0


def soak(llm, num_requests, expected):
    ends = Counter()
    clients = [Client(llm, i, num_requests // LOOPS, expected, ends) for i in range(LOOPS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    [t.start() for t in threads]
    [t.join(500) for t in threads]
    assert not any(t.is_alive() for t in threads)
    assert [client.errors for client in clients] == [[]] * LOOPS
    settle(llm)
    check_nothing_is_left(llm)
    assert ends.total() == num_requests // LOOPS * LOOPS
    return ends


@pytest.fixture(scope="module")
def expected(llm):
    result = asyncio.run(alone(llm))
    assert len({str(r) for r in result.values()}) > len(result) // 3  # else it would show nothing
    return result


def test_500_requests(llm, expected):
    ends = soak(llm, 500, expected)
    assert min(ends[how] for how in ("answered", "left", "cancelled")) > 20, ends
    assert llm.engine.scheduler.num_preemptions > 0


@pytest.mark.slow
def test_20_000_requests_in_flat_memory(llm, expected):
    soak(llm, 10_000, expected)
    gc.collect()
    half = psutil.Process().memory_info().rss
    ends = soak(llm, 10_000, expected)
    gc.collect()
    assert psutil.Process().memory_info().rss < 1.05 * half
    assert min(ends[how] for how in ("answered", "left", "cancelled")) > 400, ends
