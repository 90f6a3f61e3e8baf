"""Sampling against plain numpy with sorts, against vLLM and transformers, and against the chi-square test."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from golden_cases import FOLDER
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxllm.serving import sampling
from jaxllm.serving.sampling import SamplingArrays, sample

sample_jit, weights_jit, uniform_jit, inverse_cdf = (
    jax.jit(f) for f in (sample, sampling.weights, sampling._uniform, sampling._inverse_cdf)
)


def arrays(n, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, seed=0, position=0) -> SamplingArrays:
    """Parameters of n rows; each may be a number for all or an array [n]. `seed` is the low half."""
    full = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), n).copy()
    seeds = np.stack([np.zeros(n, np.uint32), full(seed, np.uint32)], axis=1)
    f32, i32 = np.float32, np.int32
    filters = dict(top_k=full(top_k, i32), top_p=full(top_p, f32), min_p=full(min_p, f32), typical_p=full(typical_p, f32))
    return SamplingArrays(temperature=full(temperature, f32), **filters, seed=seeds, position=full(position, i32))


def expected_weights(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0) -> np.ndarray:
    """One row's unnormalised probabilities: temperature, min_p, top_k, top_p, typical_p in that order, ties of the last token kept."""
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / np.float64(np.float32(temperature))
    weights = np.exp(np.maximum(scaled, -1e4))
    kept = weights >= min_p
    if 0 < top_k < len(logits):
        kept &= logits >= np.sort(logits)[-top_k]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        running = np.cumsum(np.where(kept, weights, 0)[order])
        last = order[np.argmax(running >= top_p * running[-1])]
        kept &= logits >= logits[last]
    weights = np.where(kept, weights, 0)
    if typical_p < 1:
        distance, share = strangeness(weights)
        order = np.argsort(distance, kind="stable")
        weights[distance > distance[order[np.argmax(np.cumsum(share[order]) >= typical_p)]]] = 0
    return weights


def strangeness(weights) -> tuple[np.ndarray, np.ndarray]:
    """How far each token's surprise is from the entropy, and the probabilities, in float64."""
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    surprise = -np.log(np.where(share > 0, share, 1.0))
    return np.where(share > 0, np.abs(surprise - (share * surprise).sum()), np.inf), share


@st.composite
def rows(draw):
    """Logits of a vocabulary that fills its last block or does not, with ties and impossible tokens."""
    vocab = draw(st.sampled_from([1, 50, 256, 257]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    logits = rng.normal(size=vocab) * draw(st.sampled_from([0.0, 0.5, 4.0, 30.0]))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        logits[rng.random(vocab) < 0.4] = -np.inf
        logits[rng.integers(vocab)] = 1.0
    return (logits + draw(st.sampled_from([0.0, -1000.0, 1000.0]))).astype(np.float32) + np.float32(0)  # + 0: no -0.0


NUCLEUS = st.one_of(st.just(1.0), st.floats(0.01, 0.999), st.sampled_from([1e-45, 1e-40, 1e-6, 0.999999]))
EIGHT = np.arange(-4, 4, dtype=np.float32)


@settings(max_examples=120)
@given(
    logits=rows(),
    temperature=st.one_of(st.floats(0.1, 3.0), st.sampled_from([2e-38, 1e-30, 1e-5, 1e3, 1e10, 1e37])),
    top_k=st.one_of(st.sampled_from([0, 1, 2, 10**9]), st.integers(1, 300)),
    top_p=NUCLEUS,
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.just(1.0)),
)
@example(EIGHT, 1.0, 0, 1e-40, 0.0)  # what is asked for rounds to nothing: the likeliest stays
@example(EIGHT, 1e10, 3, 1.0, 0.0)  # probabilities all round to 1, and yet three are the likeliest
@example(EIGHT + 1000, 2e-38, 0, 1.0, 0.0)  # logits / temperature is infinite
def test_kept_tokens_are_those_that_sorting_keeps(logits, temperature, top_k, top_p, min_p):
    params = arrays(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(weights_jit(logits[None], params))[0]
    # Where a probability meets min_p or a sum meets top_p to within rounding, either side is right.
    low, high = np.float64(np.float32([min_p, top_p])) * (1 - 1e-5), np.float64(np.float32([min_p, top_p])) * (1 + 1e-5)
    most = expected_weights(logits, temperature, top_k, min(high[1], 1.0), low[0])
    least = expected_weights(logits, temperature, top_k, low[1] if top_p < 1 else 1.0, min(high[0], 1.0))
    tiny = 1e-30  # less than this is a matter of underflow
    assert not np.any((ours > tiny) & (most == 0)) and not np.any((ours == 0) & (least > tiny))
    np.testing.assert_allclose(ours[ours > tiny], most[ours > tiny], rtol=2e-4)
    for value in np.unique(logits):
        assert len(set(ours[logits == value].tolist())) == 1, "tokens that tie are not treated alike"


@settings(max_examples=100)
@given(logits=rows(), temperature=st.floats(0.1, 3.0), mass=st.one_of(st.floats(0.01, 0.999), st.just(1e-40)), top_k=st.integers(0, 40))
@example(np.zeros(8, np.float32), 1.0, 0.3, 0)  # all are equally typical
@example(np.array([0, -200, -200], np.float32), 1.0, 0.5, 0)  # the others' probabilities round to nothing
def test_typical_tokens_are_the_nearest_to_the_entropy(logits, temperature, mass, top_k):
    options = dict(temperature=temperature, top_k=top_k)
    before = np.asarray(weights_jit(logits[None], arrays(1, **options)))[0]
    after = np.asarray(weights_jit(logits[None], arrays(1, **options, typical_p=mass)))[0]
    kept = after > 0
    np.testing.assert_array_equal(after, np.where(kept, before, 0))
    distance, share = strangeness(before)
    furthest, slack = distance[kept].max(), 1e-4 * (1 + np.abs(logits[np.isfinite(logits)]).max() / temperature)
    assert kept[distance < furthest - slack].all()
    assert share[kept].sum() >= mass * (1 - 1e-5)
    assert share[distance < furthest - slack].sum() <= mass * (1 + 1e-5), "fewer would do"
    for value in np.unique(logits):
        assert len(set(after[logits == value].tolist())) == 1, "tokens that tie are not treated alike"


def test_filters_as_vllm_and_transformers_have_them():
    """Made by goldens/make_sampling_goldens.py; all rows in one batch."""
    with np.load(FOLDER / "sampling.npz") as data:
        filters, logits, kept = json.loads(str(data["filters"])), data["wide"], data["kept"]
    off = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0)
    assert all(any(f[name] != off[name] for f in map(off.__or__, filters)) for name in off)
    columns = {name: np.array([(off | f)[name] for f in filters]) for name in off}
    ours = np.asarray(weights_jit(logits, arrays(len(filters), **columns)))
    np.testing.assert_array_equal(ours > 0, kept > 0)
    np.testing.assert_allclose(ours / ours.sum(-1, keepdims=True), kept, rtol=1e-5)


LOGITS = np.concatenate([np.random.default_rng(0).normal(size=46) * 1.5, [1.0, 1.0, 1.0, -np.inf]]).astype(np.float32)
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 25, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_the_distribution(options):
    n = 100_000
    drawn = np.asarray(sample_jit(np.tile(LOGITS, (n, 1)), arrays(n, **options, seed=np.arange(n) % 100, position=np.arange(n) // 100)))
    expected = expected_weights(LOGITS, **options)
    counts, share = np.bincount(drawn, minlength=len(LOGITS)), expected / expected.sum()
    assert counts[share == 0].sum() == 0
    kept = share > 0
    assert chisquare(counts[kept], n * share[kept]).pvalue > 1e-4


def test_chi_square_would_notice():
    """The test above can fail: draws at one temperature do not pass for another."""
    n = 100_000
    drawn = np.asarray(sample_jit(np.tile(LOGITS, (n, 1)), arrays(n, temperature=1.03, position=np.arange(n))))
    share = expected_weights(LOGITS)[:-1]
    counts = np.bincount(drawn, minlength=len(LOGITS))[:-1]
    assert chisquare(counts, n * share / share.sum()).pvalue < 1e-4


@settings(max_examples=30)
@given(logits=rows(), seed=st.integers(0, 2**31 - 1), top_p=NUCLEUS, typical_p=NUCLEUS)
def test_no_impossible_token_is_drawn(logits, seed, top_p, typical_p):
    params = arrays(64, seed=seed, position=np.arange(64), top_p=top_p, typical_p=typical_p)
    batch = np.tile(logits, (64, 1))
    assert np.take_along_axis(np.asarray(weights_jit(batch, params)), np.asarray(sample_jit(batch, params))[:, None], axis=1).min() > 0


def test_a_draw_depends_on_its_row_seed_and_position_alone():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(16, 300)).astype(np.float32)
    mixed = dict(temperature=rng.uniform(0.5, 1.5, 16), top_k=np.array([0, 9] * 8), top_p=rng.uniform(0.7, 1.0, 16))
    mixed["typical_p"] = np.array([1.0, 1.0, 0.6, 0.9] * 4)
    params = arrays(16, **mixed, seed=rng.integers(2**32, size=16), position=rng.integers(1000, size=16))
    together = np.asarray(sample_jit(logits, params))
    order = rng.permutation(16)
    np.testing.assert_array_equal(sample_jit(logits[order], SamplingArrays(*(x[order] for x in params))), together[order])
    for size in (1, 3):
        for first in range(0, 15, size):
            rows = slice(first, first + size)
            np.testing.assert_array_equal(sample_jit(logits[rows], SamplingArrays(*(x[rows] for x in params))), together[rows])


def test_greedy_rows_take_the_likeliest_whatever_is_sampled_beside_them():
    logits = np.random.default_rng(2).normal(size=(64, 300)).astype(np.float32)
    greedy = np.arange(64) % 2 == 0
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}):
        mixed = np.asarray(sample_jit(logits, arrays(64, temperature=np.where(greedy, 0.0, 5.0), position=np.arange(64), **options)))
        np.testing.assert_array_equal(mixed[greedy], logits[greedy].argmax(-1))
        alone = np.asarray(sample_jit(logits[greedy], arrays(32, temperature=0.0, **options)))
        np.testing.assert_array_equal(mixed[greedy], alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_numbers_gives_some_token_and_leaves_the_others_alone(bad, temperature):
    """The engine must live on: such a row gets a token of the vocabulary, which one is not promised."""
    logits = np.random.default_rng(3).normal(size=(8, 300)).astype(np.float32)
    options = dict(top_p=0.9, top_k=40, typical_p=0.9)
    params = arrays(8, temperature=np.where(np.arange(8) == 3, temperature, 1.0), **options, position=np.arange(8))
    before = np.asarray(sample_jit(logits, params))
    broken = logits.copy()
    broken[3] = bad
    after = np.asarray(sample_jit(broken, params))
    assert 0 <= after[3] < 300
    np.testing.assert_array_equal(np.delete(after, 3), np.delete(before, 3))


def test_uniform_numbers():
    n = 200_000
    by_position = np.asarray(uniform_jit(np.tile(np.array([[3, 5]], np.uint32), (n, 1)), np.arange(n, dtype=np.int32)))
    seeds = np.stack([np.arange(n) % 7, np.arange(n)], axis=1).astype(np.uint32)
    by_seed = np.asarray(uniform_jit(seeds, np.full(n, 5, np.int32)))
    next_position = np.asarray(uniform_jit(seeds, np.full(n, 6, np.int32)))
    by_high_half = np.asarray(uniform_jit(seeds[:, ::-1], np.full(n, 5, np.int32)))
    for u in (by_position, by_seed, by_high_half):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n) and abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
        assert chisquare(np.bincount((u * 1000).astype(int), minlength=1000)).pvalue > 1e-4
    pairs = [(by_seed, next_position), (by_seed, by_position), (by_seed, by_high_half)]
    pairs += [(u[:-1], u[1:]) for u in (by_seed, by_position)]  # neighbours
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)


@partial(jax.jit, static_argnames="vocab")
def _draw_one_hot(places, u, vocab):
    return sampling._inverse_cdf(jax.nn.one_hot(places, vocab), u)


def test_inverse_cdf_over_a_large_vocabulary():
    """Powers of two sum without rounding, so that the token is known exactly, at the edges of blocks too."""
    vocab, rng = 49152, np.random.default_rng(4)
    weights = np.where(rng.random(vocab) < 0.5, 0.0, 2.0 ** -rng.integers(0, 4, vocab)).astype(np.float32)
    weights[5 * 256 : 9 * 256] = weights[-300:] = 0  # whole blocks without weight, and none at the end
    ends = np.cumsum(weights.astype(np.float64))
    edges = np.concatenate([ends[255::256], ends[254::256], ends[:10]]) / ends[-1]
    u = np.concatenate([edges, edges - 2**-22, edges + 2**-22, np.linspace(0, 1, 501), [0, 2**-24, 1 - 2**-23, 1 - 2**-24]])
    u = np.unique(np.clip(u, 0, 1 - 2**-24).astype(np.float32))
    target = (u * np.float32(ends[-1])).astype(np.float64)  # rounded as on the device
    expected = np.searchsorted(ends, target, side="right")
    drawn = np.concatenate([inverse_cdf(np.tile(weights, (128, 1)), part) for part in np.resize(u, (-(-len(u) // 128), 128))])[: len(u)]
    np.testing.assert_array_equal(drawn, expected)
    assert (weights[drawn] > 0).all() and drawn.max() == np.flatnonzero(weights)[-1]


def test_inverse_cdf_finds_the_only_token_there_is():
    places = np.array([0, 255, 256, 257, 511, 49151, 49150, 25000], np.int32)
    for u in (0.0, 0.5, 1 - 2**-23, 1 - 2**-24):
        np.testing.assert_array_equal(_draw_one_hot(places, np.full(8, u, np.float32), 49152), places)


def test_inverse_cdf_of_real_probabilities_over_a_large_vocabulary():
    """Float32 sums are inexact: the token drawn is one whose interval, widened by rounding, holds u."""
    rng = np.random.default_rng(5)
    weights = np.exp(rng.normal(size=(64, 49152)) * 3).astype(np.float32)
    weights /= weights.max(axis=1, keepdims=True)
    weights[weights < 1e-3] = 0
    u = np.concatenate([rng.random(62), [0, 1 - 2**-24]]).astype(np.float32)
    drawn = np.asarray(inverse_cdf(weights, u))[:, None]
    ends = np.cumsum(weights.astype(np.float64), axis=1)
    upper, weight = np.take_along_axis(ends, drawn, 1)[:, 0], np.take_along_axis(weights, drawn, 1)[:, 0]
    slack, target = 1e-5 * ends[:, -1], u * ends[:, -1]
    assert (weight > 0).all() and (target <= upper + slack).all() and (target >= upper - weight - slack).all()
