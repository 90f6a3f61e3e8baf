"""Token ids and decoded text equal Hugging Face's (goldens by make_tokenizer_goldens.py) for every kind of vocabulary."""

import json
import shutil

import pytest
from tokenizer_goldens import GOLDENS, golden

from jaxllm.tokenizers import Tokenizer, load_tokenizer


def check(tokenizer: Tokenizer, cases: list[dict]) -> None:
    for case in cases:
        if "text" in case:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
            assert tokenizer.encode(case["text"], add_special_tokens=False) == case["bare"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded_all"]


def test_smollm2_from_gguf(smollm2):
    check(smollm2, golden("smollm2.json"))
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert 2 in smollm2.eos_token_ids
    assert smollm2.special_token_ids == frozenset(range(17))
    assert smollm2.chat_template == (GOLDENS / "templates" / "smollm2.jinja").read_text()


def test_byte_level_tokenizer_json():
    tokenizer = load_tokenizer(GOLDENS / "byte_bpe")
    check(tokenizer, golden("byte_bpe.json"))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 3, 4)


@pytest.mark.parametrize("case", golden("sentencepiece_bpe.json"), ids=range(4))
def test_llama_folder_with_only_tokenizer_model(case, tmp_path):
    shutil.copy(GOLDENS / "sentencepiece_bpe" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(case["config"]))
    check(load_tokenizer(tmp_path), case["cases"])


def test_unigram_tokenizer_model_equals_sentencepiece():
    tokenizer = load_tokenizer(GOLDENS / "sentencepiece_unigram")
    cases = golden("sentencepiece_unigram.json")
    assert len(cases) > 15
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["bare"], case["text"]
        assert tokenizer.decode(case["bare"]) == case["decoded"]
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_token_id == 1
