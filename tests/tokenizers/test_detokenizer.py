"""Incremental detokenisation equals decoding everything at once, and never takes back what it returned."""

import json
from functools import lru_cache

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizer_goldens import GOLDENS
from tokenizers import decoders, models

from jaxllm.errors import RequestError, TokenizerError
from jaxllm.tokenizers import IncrementalDetokenizer, Tokenizer, load_tokenizer


@lru_cache
def make(kind: str) -> Tokenizer:
    if kind in ("byte_bpe", "sentencepiece_bpe", "sentencepiece_unigram"):
        return load_tokenizer(GOLDENS / kind)
    # The same vocabulary with the other decoders found in published files.
    source = make("sentencepiece_bpe").backend
    backend = tokenizers.Tokenizer(models.WordLevel({t: i for t, i in source.get_vocab().items()}, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = {
        "metaspace": lambda: decoders.Metaspace("▁", "always"),
        "metaspace never": lambda: decoders.Metaspace("▁", "never"),
        "strip pieces": lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 1), decoders.ByteFallback()]),
        "none": lambda: None,
    }[kind]()
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


KINDS = ("byte_bpe", "sentencepiece_bpe", "sentencepiece_unigram", "metaspace", "metaspace never", "strip pieces", "none")


def interesting_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids; often bytes and special tokens, where the difficulties are."""
    anything = st.integers(0, tokenizer.vocab_size - 1)
    text = st.text(max_size=8).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    lists = st.one_of(st.lists(anything, max_size=6), st.lists(st.integers(0, min(270, tokenizer.vocab_size - 1)), max_size=6), text)
    return st.lists(lists, max_size=5).map(lambda parts: sum(parts, []))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_whole(kind, data):
    tokenizer = make(kind)
    ids = data.draw(interesting_ids(tokenizer))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    written = ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        written += detokenizer.add(ids[start:end])
        # A prefix of the final text: so no U+FFFD appears that the final text does not have there.
        assert whole.startswith(written)
    assert written + detokenizer.finish() == whole


@pytest.mark.parametrize("kind", ("byte_bpe", "sentencepiece_bpe", "sentencepiece_unigram"))
@given(prompt=st.text(max_size=20), answer=st.text(max_size=20))
def test_after_a_prompt(kind, prompt, answer):
    tokenizer = make(kind)
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids)
    pieces = [detokenizer.add([i]) for i in ids] + [detokenizer.finish()]
    assert tokenizer.decode(prompt_ids) + "".join(pieces) == tokenizer.decode(prompt_ids + ids)


def test_a_character_broken_off_by_the_prompt_is_completed():
    for kind in ("byte_bpe", "sentencepiece_bpe"):
        tokenizer = make(kind)
        ids = tokenizer.encode("x\U0001f9ff", add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=ids[:-2])
        assert detokenizer.add(ids[-2:]) + detokenizer.finish() == "\U0001f9ff"


@given(text=st.text(max_size=40))
def test_every_finished_character_is_returned_at_once(text):
    """Byte-level: after the last token of a character nothing is held back."""
    tokenizer = make("byte_bpe")
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert detokenizer.add(tokenizer.encode(text, add_special_tokens=False)) == text
    assert detokenizer.finish() == ""


@given(text=st.text(max_size=60))
def test_byte_level_round_trip(text):
    tokenizer = make("byte_bpe")
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


@given(text=st.text(max_size=30))
def test_smollm2_round_trip(smollm2, text):
    # The vocabulary lacks tokens for a few control characters and for unassigned planes; like Hugging Face we drop those.
    assume(not set(text) & set(map(chr, (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D))) and max(text, default="") < "\U00040000")
    ids = smollm2.encode(text)
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    detokenizer = IncrementalDetokenizer(smollm2, skip_special_tokens=False)
    assert "".join(detokenizer.add([i]) for i in ids) == text


@given(text=st.text(max_size=40))
def test_sentencepiece_round_trip(text):
    tokenizer = make("sentencepiece_unigram")
    assume("▁" not in text)  # sentencepiece's own spelling of a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cost_per_token_does_not_grow():
    """Runs a long text; re-decoding it for every token would take minutes."""
    tokenizer = make("byte_bpe")
    ids = tokenizer.encode("The quick brown fox, 漢字! ", add_special_tokens=False) * 5000
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.add([i]) for i in ids) == "The quick brown fox, 漢字! " * 5000


def test_refusals():
    tokenizer = make("byte_bpe")
    with pytest.raises(RequestError, match=f"Token id {tokenizer.vocab_size} at position 1"):
        IncrementalDetokenizer(tokenizer).add([5, tokenizer.vocab_size])
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.decoder = decoders.WordPiece()
    assert json.loads(backend.decoder.__getstate__())["type"] == "WordPiece"
    with pytest.raises(TokenizerError, match="WordPiece"):
        IncrementalDetokenizer(Tokenizer(backend, special_tokens={}))
