"""Loading and saving: which file counts, what is refused, and that what is saved loads the same."""

import json
import shutil

import gguf
import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizer_goldens import GOLDENS, golden

from jaxllm.errors import RequestError, TokenizerError
from jaxllm.tokenizers import Tokenizer, load_tokenizer, save_tokenizer

TEXTS = [case["text"] for case in golden("byte_bpe.json") if "text" in case]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDENS / "byte_bpe", tmp_path / "model")


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def write_gguf(path, tokens, *, model="llama", arch="llama", types=None, scores=None, merges=None, **fields):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in fields.items():
        writer.add_key_value(
            f"tokenizer.{key.replace('__', '.')}",
            value,
            {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}[type(value)],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def same(first: Tokenizer, second: Tokenizer) -> None:
    for text in TEXTS:
        ids = first.encode(text)
        assert second.encode(text) == ids
        assert second.decode(ids) == first.decode(ids)
    for field in (
        "vocab_size",
        "special_tokens",
        "special_token_ids",
        "eos_token_ids",
        "pad_token_id",
        "chat_templates",
        "model_max_length",
    ):
        assert getattr(first, field) == getattr(second, field), field


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_gguf_sentencepiece_equals_sentencepiece(kind, tmp_path):
    file = GOLDENS / f"sentencepiece_{kind}" / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    pieces = [(piece.piece, piece.type, piece.score) for piece in proto.pieces]
    tokens, types, scores = map(list, zip(*pieces, strict=True))
    path = write_gguf(tmp_path / "m.gguf", tokens, types=types, scores=scores, ggml__eot_token_id=5)
    tokenizer, reference = load_tokenizer(path), SentencePieceProcessor(model_file=str(file))
    for case in golden("sentencepiece_unigram.json"):
        ids = reference.encode(case["text"])
        assert tokenizer.encode(case["text"], add_special_tokens=False) == ids, case["text"]
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2, 5)
    assert tokenizer.encode("<unk></s>")[1:] == [0, 2]

    save_tokenizer(tokenizer, tmp_path / "saved")
    same(tokenizer, load_tokenizer(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["it", "'s", " ", "1", "2", " done", "\n\n", "\n", "x"]),
        ("gpt-2", ["it", "'s", " 12", " done", "\n\n", "\n", "x"]),
        ("default", ["it", "'", "s", " ", "12", " done", "\n\n", "\n", "x"]),
        ("llama-bpe", ["it", "'s", " ", "12", " done", "\n\n\n", "x"]),
        ("qwen2", ["it", "'s", " ", "1", "2", " done", "\n\n\n", "x"]),
    ],
)
def test_gguf_pre_tokenizers(pre, words, tmp_path):
    source = load_tokenizer(GOLDENS / "byte_bpe")
    types = [3 if i in source.special_token_ids else 1 for i in range(source.vocab_size)]
    merges = [" ".join(pair) for pair in json.loads(source.backend.model.__getstate__())["merges"]]
    path = write_gguf(tmp_path / "m.gguf", source.id_to_token, model="gpt2", types=types, merges=merges, ggml__pre=pre, chat_template="T")
    tokenizer = load_tokenizer(path)
    text = "it's 12 done\n\n\nx"
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words
    assert tokenizer.chat_template == "T"
    assert tokenizer.encode("a")[:1] != [tokenizer.bos_token_id]  # no bos_token_id in the file, so none is added


def test_gguf_refusals(tmp_path):
    good = dict(tokens=["a", "b", "ab"], merges=["a b"], model="gpt2", ggml__pre="gpt-2")
    for fields, culprit in [
        ({"ggml__pre": "unheard-of"}, "'unheard-of'"),
        ({"model": "bert"}, "'bert'"),
        ({"merges": None}, "without merges"),
        ({"merges": None, "model": "llama"}, "neither scores nor merges"),
        ({"merges": ["x y"]}, "broken"),
        ({"types": [1]}, "1 types"),
        ({"ggml__eos_token_id": 9}, "eos_token_id 9"),
        ({"tokens": ["a", "b", b"\xff"], "merges": []}, "Token 2"),
    ]:
        path = write_gguf(tmp_path / "m.gguf", **(good | fields))
        with pytest.raises(TokenizerError) as error:
            load_tokenizer(path)
        assert culprit in str(error.value) and "m.gguf" in str(error.value)


def test_gguf_without_a_pre_tokenizer_warns(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", ["a", "b", "ab"], merges=["a b"], model="gpt2")
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        assert load_tokenizer(path).encode("abb") == [2, 1]


def test_gguf_token_types_and_end_tokens(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<|user|>", "<|end|>", "<think>", "  "]
    fields = dict(types=[2, 3, 3, 1, 1, 1, 3, 3, 4, 4], merges=["▁ a"], ggml__add_eos_token=True, ggml__unknown_token_id=0)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "llama.gguf", tokens, **fields))
    assert tokenizer.encode("a<think>a") == [1, 5, 8, 5, 2]
    assert tokenizer.decode([1, 5, 8, 5, 9, 2]) == "a<think> a  "
    assert tokenizer.special_token_ids == {0, 1, 2, 6, 7}
    assert tokenizer.eos_token_ids == (2, 7)
    assert tokenizer.encode("<|user|> a", add_special_tokens=False) == [6, 3, 5]
    # Phi-3's control tokens swallow the white space after them.
    phi3 = load_tokenizer(write_gguf(tmp_path / "phi3.gguf", tokens, arch="phi3", **fields))
    assert phi3.encode("<|user|> a", add_special_tokens=False) == [6, 5]


def test_save_and_load_smollm2(smollm2, tmp_path):
    save_tokenizer(smollm2, tmp_path)
    same(smollm2, load_tokenizer(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and config["chat_template"] == smollm2.chat_template


def test_save_keeps_templates_and_other_generation_fields(folder, tmp_path):
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}])
    edit(folder / "generation_config.json", eos_token_id=[4, 2], temperature=0.5)
    tokenizer = load_tokenizer(folder)
    out = tmp_path / "out"
    out.mkdir()
    edit(out / "generation_config.json", top_k=3)
    save_tokenizer(tokenizer, out)
    same(tokenizer, load_tokenizer(out))
    assert json.loads((out / "generation_config.json").read_text()) == {"top_k": 3, "eos_token_id": [4, 2]}
    user = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(user, tokenize=False) == "D"
    assert tokenizer.apply_chat_template(user, tokenize=False, tools=[{"type": "function"}]) == "U"
    assert tokenizer.apply_chat_template(user, tokenize=False, chat_template="tool_use") == "U"


def test_where_chat_templates_come_from(folder):
    user = [{"role": "user", "content": "x"}]
    edit(folder / "tokenizer_config.json", chat_template="one")
    assert load_tokenizer(folder).apply_chat_template(user, tokenize=False) == "one"
    edit(folder / "chat_template.json", chat_template="two")
    assert load_tokenizer(folder).chat_template == "two"
    (folder / "chat_template.jinja").write_text("three")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("four")
    assert load_tokenizer(folder).chat_templates == {"default": "three", "rag": "four"}


def test_special_tokens_and_ends(folder):
    edit(folder / "generation_config.json", eos_token_id=2)
    edit(folder / "special_tokens_map.json", unk_token={"content": "<new>", "lstrip": False}, eos_token="<s>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == (4, 2)  # tokenizer_config.json wins over special_tokens_map.json
    assert tokenizer.special_tokens["unk_token"] == "<new>"
    assert tokenizer.encode("a<new>") == [*tokenizer.encode("a"), tokenizer.vocab_size - 1]
    assert tokenizer.vocab_size - 1 in tokenizer.special_token_ids

    plain = load_tokenizer(GOLDENS / "byte_bpe")
    assert plain.encode("hi") == plain.encode("hi", add_special_tokens=False)
    edit(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    assert load_tokenizer(folder).encode("hi") == [3, *plain.encode("hi"), 4]


def test_added_tokens_must_fit_the_vocabulary(folder):
    size = load_tokenizer(folder).vocab_size
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size): {"content": "<x>", "special": True}})
    assert load_tokenizer(folder).encode("<x>") == [size]
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size + 7): {"content": "<x>", "special": True}})
    with pytest.raises(TokenizerError, match="do not belong together"):
        load_tokenizer(folder)


def test_folder_refusals(folder, tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"\x00\x01nonsense")
    with pytest.raises(TokenizerError, match="tokenizer.model"):
        load_tokenizer(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(TokenizerError, match="XLMRobertaTokenizer"):
        load_tokenizer(folder)


def test_bad_text_and_ids():
    tokenizer = load_tokenizer(GOLDENS / "byte_bpe")
    with pytest.raises(RequestError, match="lone surrogate .* position 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(RequestError, match="bytes"):
        tokenizer.encode(b"ab")
    for ids in ([-1], [tokenizer.vocab_size], [1.5], ["a"]):
        with pytest.raises(RequestError, match="position 0"):
            tokenizer.decode(ids)
