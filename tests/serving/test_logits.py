"""What requests do to their logits, against vLLM's sampler (goldens/make_sampling_goldens.py)."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import SamplingParams
from jaxllm.errors import RequestError
from jaxllm.serving.logits import process_logits
from jaxllm.serving.logprobs import token_logprobs
from jaxllm.serving.slot_state import MAX_BIASED, SlotWriter, check_slot, features, make_slots, needs_slot
from jaxllm.sharding import make_mesh

with np.load(FOLDER / "sampling.npz") as data:
    GOLDEN = dict(data)
REQUESTS = json.loads(str(GOLDEN["requests"]))
N, VOCAB = GOLDEN["logits"].shape
LENGTH = 32


def completion(bad=(), stop=(), prompt=(1,), output=(), max_tokens=64, **params):
    """What the device is told of a request; `bad` words are tokens."""
    request = SimpleNamespace(
        params=SamplingParams(max_tokens=max_tokens, stop_token_ids=list(stop), ignore_eos=True, **params),
        prompt_token_ids=list(prompt),
        stop_token_ids=frozenset(stop),
        bad_words=tuple(map(tuple, bad)),
        max_tokens=max_tokens,
    )
    return SimpleNamespace(request=request, token_ids=[*prompt, *output], matcher=None)


class Batch:
    """N slots of which requests take the last ones, the first of them the last of all; `run` processes rows of logits."""

    def __init__(self, vocab=VOCAB, size=N):
        mesh = make_mesh(tensor=1)
        self.empty = make_slots(size, LENGTH, vocab, mesh)
        self.writer = SlotWriter(self.empty, vocab, mesh)
        self.write = self.writer.compile()
        self.process = jax.jit(process_logits, static_argnums=3)

    def run(self, completions, logits, processors=(), processor=None):
        # The program uses up what it is given. Whoever had the slots before left something in all of them.
        slots = jax.tree.map(lambda x: x + jnp.ones_like(x), self.empty)
        places = len(slots.last_tokens) - 1 - np.arange(len(completions))
        for c, slot in zip(completions, places, strict=True):
            if needs_slot(c):
                slots = self.writer.run(self.write, slots, self.writer.pack(c, slot))
        each = lambda value, dtype=np.int32: np.array([value(c) for c in completions], dtype)
        batch = {
            "slots": places.astype(np.int32),
            "features": each(features),
            "processor": np.zeros(len(places), np.int32) if processor is None else np.asarray(processor, np.int32),
            "position": each(lambda c: len(c.token_ids)),
            "num_prompt": each(lambda c: len(c.request.prompt_token_ids)),
            "presence": each(lambda c: c.request.params.presence_penalty, np.float32),
            "frequency": each(lambda c: c.request.params.frequency_penalty, np.float32),
            "repetition": each(lambda c: c.request.params.repetition_penalty, np.float32),
        }
        return np.asarray(self.process(logits, batch, slots, processors))


@pytest.fixture(scope="module")
def batch():
    return Batch()


def test_all_of_it_as_vllm_does(batch):
    ours = batch.run([completion(**r) for r in REQUESTS], GOLDEN["logits"])
    changed = np.any(GOLDEN["processed"] != GOLDEN["logits"], axis=1)
    assert changed.sum() == 17, "the golden tests nothing"
    np.testing.assert_array_equal(ours[~changed], GOLDEN["logits"][~changed])
    np.testing.assert_allclose(ours, GOLDEN["processed"], rtol=1e-6, atol=1e-6)
    untouched = (GOLDEN["processed"] == GOLDEN["logits"]) & changed[:, None]
    np.testing.assert_array_equal(ours[untouched], GOLDEN["logits"][untouched])


@settings(max_examples=25)
@given(st.permutations(range(N)))
def test_a_row_does_not_depend_on_its_company(batch, order):
    rows = list(order)[: N // 2]
    padded = rows + [0] * (N - len(rows))  # row 0 asks for nothing
    ours = batch.run([completion(**REQUESTS[i]) for i in padded], GOLDEN["logits"][padded])
    np.testing.assert_allclose(ours, GOLDEN["processed"][padded], rtol=1e-6, atol=1e-6)


def test_processors_come_between_bias_and_penalties(batch):
    """Each row's own, told of its tokens; rows without one are left alone."""

    def double(logits, tokens, count):
        return 2 * logits

    def forbid_the_last_token(logits, tokens, count):
        return logits.at[tokens[count - 1]].set(-jnp.inf)

    def as_bfloat16(logits, tokens, count):
        return (logits - logits).astype(jnp.bfloat16)

    processors = (double, forbid_the_last_token, as_bfloat16)
    plain = dict(prompt=[4, 5], output=[6], logit_bias={9: 1.5}, presence_penalty=1.0)
    which = [0, 1, 2, 3] + [0] * (N - 4)
    logits = GOLDEN["logits"]
    needing = [completion(prompt=[4, 5], output=[6], logits_processor=name) for name in ("double", "forbid", "zero")]
    ours = batch.run([completion(**plain)] + needing + [completion()] * (N - 4), logits, processors, which)
    np.testing.assert_array_equal(ours[1], 2 * logits[1])
    expected = logits[2].copy()
    expected[6] = -np.inf
    np.testing.assert_array_equal(ours[2], expected)
    np.testing.assert_array_equal(ours[3], np.zeros(VOCAB, np.float32))
    np.testing.assert_array_equal(ours[4:], logits[4:])
    both = [completion(**plain, logits_processor="double")] + [completion()] * (N - 1)
    together = batch.run(both, logits, processors, [1] + [0] * (N - 1))
    expected = logits[0].copy()
    expected[9] += np.float32(1.5)
    expected *= 2
    expected[6] -= 1
    np.testing.assert_allclose(together[0], expected, rtol=1e-6)


def test_min_tokens_ends_and_the_bias_stays(batch):
    for count, held in ((0, True), (2, True), (3, False), (4, False)):
        c = completion(prompt=[1, 2], output=[5] * count, stop=[8], min_tokens=3, logit_bias={8: 2.0, 9: 3.0})
        ours = batch.run([c] + [completion()] * (N - 1), GOLDEN["logits"])[0] - GOLDEN["logits"][0]
        np.testing.assert_allclose(ours[[8, 9]], [-np.inf if held else 2.0, 3.0], rtol=1e-5)
        assert not np.delete(ours, [8, 9]).any()


REFUSED = {
    "too many biases": (dict(logit_bias={i: 1.0 for i in range(MAX_BIASED + 1)}), "logit_bias, .* 1025 tokens together, and 1024"),
    "biases and stops": (
        dict(logit_bias={i: 1.0 for i in range(MAX_BIASED)}, min_tokens=1, stop=[2000]),
        "min_tokens holds back name 1025 tokens",
    ),
    "too many bad words": (dict(bad=[[i, i] for i in range(129)]), "bad_words may be 128 words .* these are 129 of up to 2"),
    "a long bad word": (dict(bad=[[1] * 9]), "bad_words may be .* up to 8 tokens .* 1 of up to 9"),
    "nothing left of what is allowed": (dict(allowed_token_ids=[5, 6], bad=[[5]], min_tokens=2, stop=[6]), "allowed_token_ids leaves no"),
    "nothing left": (dict(bad=[[5]], min_tokens=2, stop=[t for t in range(3000) if t != 5]), "name 3000 tokens"),
    "nothing left of a small vocabulary": (dict(bad=[[0]], min_tokens=2, stop=range(1, 640)), "min_tokens and bad_words leave no"),
    "min_tokens beyond all": (dict(min_tokens=10**12, max_tokens=None), "min_tokens=1000000000000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_slot_cannot_hold_is_refused(case):
    request, message = REFUSED[case]
    refused = completion(**request)
    refused.request.max_tokens = refused.request.max_tokens or 64
    with pytest.raises(RequestError, match=message):
        check_slot(refused, 640)


def test_as_much_as_a_slot_can_hold():
    vocab = 2000
    batch = Batch(vocab, 2)
    full = dict(logit_bias={i: i / 100 for i in range(MAX_BIASED)}, bad=[[i % 3, i] for i in range(127)] + [[1500 + i for i in range(8)]])
    c = completion(**full, output=[1])
    check_slot(c, vocab)
    logits = np.zeros((2, vocab), np.float32)
    expected = np.concatenate([np.arange(MAX_BIASED) / 100, np.zeros(vocab - MAX_BIASED)]).astype(np.float32)
    expected[1:127:3] = -np.inf
    ours = batch.run([c, completion()], logits)
    np.testing.assert_array_equal(ours[0], expected)
    np.testing.assert_array_equal(ours[1], 0)


def test_logprobs_and_ranks():
    logits, tokens = GOLDEN["logits"][:3].copy(), np.array([3, 50, 99], np.int32)
    tokens[2] = logits[2].argmax()
    ours = jax.jit(token_logprobs, static_argnums=2)(logits, tokens, 5)
    reference = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-reference, axis=-1)
    np.testing.assert_allclose(ours.logprob, np.take_along_axis(reference, tokens[:, None], 1)[:, 0], atol=2e-6)
    np.testing.assert_array_equal(ours.rank, [list(row).index(t) + 1 for row, t in zip(order, tokens, strict=True)])
    np.testing.assert_array_equal(ours.top_ids, order[:, :5])
    np.testing.assert_allclose(ours.top_logprobs, np.take_along_axis(reference, order[:, :5], 1), atol=2e-6)
