"""Text as it streams against the whole text decoded at once; the closed set of shapes; a step's arrays in one buffer."""

import jax
import numpy as np
import pytest
from golden_cases import FOLDER
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from jaxllm.serving.batch import BatchLayout, Bucket, make_buckets, pick_bucket, step_layout
from jaxllm.serving.output import TextStream
from jaxllm.serving.request import SamplingParams
from jaxllm.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer(FOLDER / "tokenizers" / "byte_bpe")
REPLACEMENT = "\ufffd"


def stream(ids: list[int], stops: list[str], prompt: list[int]) -> tuple[list[str], str | None, int]:
    """What is shown after each token and at the end, the stop string that ended it, and how many tokens were looked at."""
    text = TextStream(TOKENIZER, SamplingParams(stop=stops), prompt)
    shown = []
    for n, token in enumerate(ids, 1):
        stop = text.add(token)
        shown.append(text.text)
        if stop is not None:
            assert text.finish() is None and text.text == shown[-1]  # nothing comes after a stop string
            return shown, stop, n
    stop = text.finish()
    return [*shown, text.text], stop, len(ids)


def decoded(prompt: list[int], ids: list[int]) -> str:
    """The text of `ids` after a prompt of whole characters."""
    return TOKENIZER.decode(prompt + ids)[len(TOKENIZER.decode(prompt)) :]


@st.composite
def outputs(draw):
    """Token ids, of real text or at random (broken characters among them), and stop strings that may be in their text."""
    text = st.text(alphabet="aab \nThe quick brown fox é漢🙂.,", max_size=40)
    ids = draw(st.one_of(text.map(TOKENIZER.encode), st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=25)))
    whole = TOKENIZER.decode(ids)
    pieces = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 9)).map(lambda p: whole[p[0] : p[0] + p[1]])
    stops = draw(st.lists(st.one_of(pieces, pieces.map(lambda s: s + "!"), st.text(alphabet="ab. ", min_size=1, max_size=4)), max_size=4))
    prompt = draw(st.sampled_from([[], TOKENIZER.encode("The quick"), TOKENIZER.encode("a 漢")]))
    return ids, [s for s in stops if s and REPLACEMENT not in s], prompt


@settings(max_examples=500)
@given(outputs())
@example((TOKENIZER.encode("aaab"), ["aab"], []))
@example((TOKENIZER.encode("abcabd"), ["cabx", "abd"], []))
@example((TOKENIZER.encode("x 漢字"), ["漢字"], []))
def test_stop_strings(case):
    ids, stops, prompt = case
    shown, stop, count = stream(ids, stops, prompt)
    # The first token with which the text contains a stop string ends it, before the stop string that begins first.
    # (A character that is not finished yet decodes to U+FFFD, which no stop string here has.)
    ends = next((n for n in range(1, len(ids) + 1) if any(s in decoded(prompt, ids[:n]) for s in stops)), None)
    full = decoded(prompt, ids[:ends])
    if ends is None:
        assert stop is None and shown[-1] == full
    else:
        place = min(full.find(s) for s in stops if s in full)
        assert count == ends and shown[-1] == full[:place]
        assert stop in stops and full.startswith(stop, place)
    for before, after in zip(shown, shown[1:], strict=False):
        assert after.startswith(before), "text that was shown is never taken back"


@given(outputs())
def test_all_that_cannot_become_a_stop_string_is_shown_at_once(case):
    ids, stops, prompt = case
    shown, stop, _ = stream(ids, stops, prompt)
    assume(stop is None)
    for n, text in enumerate(shown[:-1], 1):
        known = decoded(prompt, ids[:n]).rstrip(REPLACEMENT)
        held = known[len(text) :]
        assert not held or any(s.startswith(held) for s in stops)


def test_a_stop_string_of_characters_that_never_were_ends_the_text_at_its_end():
    """Half a character becomes U+FFFD only when no more tokens come."""
    half = TOKENIZER.encode("漢")[:1]
    assert TOKENIZER.decode(half) == REPLACEMENT
    ids = [*TOKENIZER.encode("ab"), *half]
    assert stream(ids, [], [])[0][-2:] == ["ab", "ab" + REPLACEMENT]
    shown, stop, _ = stream(ids, [REPLACEMENT], [])
    assert shown[-1] == "ab" and stop == REPLACEMENT


def first_stop(ids: list[int], stops: list[str], prompt: list[int], min_tokens: int) -> tuple[int, int, str] | None:
    """By vLLM's definition (`check_stop_strings`): after how many tokens, and where, the first stop string that ends in the text of
    tokens past min_tokens is; it may begin before."""
    unchecked = len(stream(ids[:min_tokens], [], prompt)[0][min_tokens - 1]) if min_tokens else 0
    for n in range(min_tokens + 1, len(ids) + 1):
        text = decoded(prompt, ids[:n])
        found = [(place, n, s) for s in stops if (place := text.find(s, max(0, unchecked + 1 - len(s)))) >= 0]
        if found:
            place, n, stop = min(found)
            return n, place, stop
    return None


@settings(max_examples=500)
@given(outputs(), st.integers(0, 12), st.booleans())
@example((TOKENIZER.encode("xyz"), ["xy"], []), 1, False)  # begins in what min_tokens holds back, and ends past it
@example((TOKENIZER.encode("xyz"), ["xy"], []), 2, False)
@example((TOKENIZER.encode("wxyzz"), ["xy", "wxyzq"], []), 3, True)  # the first is in what is kept back for the second
@example((TOKENIZER.encode("aaaa"), ["aa"], []), 2, False)
def test_stop_strings_after_min_tokens_and_kept_in_the_output(case, min_tokens, keep):
    ids, stops, prompt = case
    min_tokens = min(min_tokens, len(ids))
    params = SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=None, include_stop_str_in_output=keep)
    expected = first_stop(ids, stops, prompt, min_tokens)
    text = TextStream(TOKENIZER, params, prompt)
    shown = [""]
    for n, token in enumerate(ids, 1):
        stop = text.add(token)
        assert text.text.startswith(shown[-1]), "text that was shown is never taken back"
        shown.append(text.text)
        if stop is not None:
            assert expected is not None and (n, stop) == (expected[0], expected[2])
            end = expected[1] + (len(stop) if keep else 0)
            assert text.finish() is None and text.text == decoded(prompt, ids[:n])[:end]
            return
    assert expected is None and text.finish() is None and text.text == decoded(prompt, ids)


def test_tokens_without_text_and_engines_without_a_tokenizer():
    ids = TOKENIZER.encode("The quick")
    beyond = TOKENIZER.vocab_size + 7  # a row of the vocabulary that the tokenizer has no token for
    assert stream([beyond, *ids, beyond], ["zz"], [beyond])[0][-1] == "The quick"
    silent = TextStream(None, SamplingParams(), [1, 2])
    assert silent.add(3) is None and silent.finish() is None and silent.text == ""


@given(st.integers(1, 300), st.integers(0, 5000), st.booleans(), st.data())
def test_every_step_has_a_smallest_bucket(max_num_seqs, more_tokens, one_row, data):
    budget = max_num_seqs + more_tokens
    buckets = make_buckets(max_num_seqs, budget, one_row=one_row)
    least = 1 if one_row else 2
    most, largest = max(max_num_seqs, least), max(budget, least)
    assert len(set(buckets)) == len(buckets) <= 2 * (np.log2(largest) + 2)
    assert all(b.tokens >= least and b.sequences >= least for b in buckets)
    assert all(b.sequences == min(b.tokens, most) for b in buckets)  # no more places than can be filled
    sequences = data.draw(st.integers(1, max_num_seqs))
    decode = data.draw(st.booleans())
    tokens = sequences if decode else data.draw(st.integers(sequences, budget))
    picked = pick_bucket(buckets, tokens, sequences, decode)
    fitting = [b for b in buckets if b.decode == decode and b.tokens >= tokens and b.sequences >= sequences]
    assert picked in fitting and all(picked.tokens <= b.tokens and picked.sequences <= b.sequences for b in fitting)
    assert picked.tokens <= largest and picked.sequences <= most


@pytest.mark.parametrize("bucket", [Bucket(1, 1, True), Bucket(48, 5)])
def test_arrays_of_a_step_arrive_bit_for_bit(bucket):
    layout = step_layout(bucket, max_pages=7)
    buffer, views = layout.new()
    assert buffer.dtype == np.int32 and buffer.shape == (layout.size,) and not buffer.any()
    rng = np.random.default_rng(0)
    written = {}
    for name, view in views.items():
        bits = rng.integers(0, 2**32, size=view.shape, dtype=np.uint32)  # NaN, infinities and denormals among the floats
        bits.flat[0] = {"f": 0x7FC00001, "i": 0x80000000, "u": 0xFFFFFFFF}[view.dtype.kind]
        view[...] = bits.view(view.dtype)
        written[name] = bits
    arrays = jax.jit(layout.unpack)(buffer)
    assert set(arrays) == set(written)
    for name, array in arrays.items():
        assert array.dtype == views[name].dtype and array.shape == views[name].shape
        np.testing.assert_array_equal(np.asarray(array).view(np.uint32), written[name], err_msg=name)


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from([np.int32, np.uint32, np.float32])), min_size=1, max_size=6))
def test_layouts_do_not_overlap(fields):
    layout = BatchLayout({str(i): (shape, np.dtype(dtype)) for i, (shape, dtype) in enumerate(fields)})
    buffer, views = layout.new()
    for i, view in enumerate(views.values()):
        view[...] = i + 1
    assert (buffer != 0).all()  # every place belongs to a field
    for i, view in enumerate(views.values()):
        assert (view == i + 1).all()  # and to one only
