"""Makes the tokenizer goldens: what Hugging Face's own tokenizers answer for vocabularies and texts that are checked in beside this script.

Run it in an environment with transformers 5, sentencepiece, protobuf, jinja2 and gguf, giving the demo model (a SmolLM2 GGUF file):

    python tests/goldens/tokenizers/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tokenizers"))
from example_tools import TOOLS  # noqa: E402

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\t\tx\r\n\r\n",
    "Hello, world!",
    " Hello",
    "  two spaces  inside  and after  ",
    "I'm you're HE'LL 'tis won't've",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "x  1   22\n\n\n   333",
    "def f(x):\n    return x ** 2  # square\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "naïve café — “quotes” … ‘single’",
    "e\u0301 a\u0300 \u00e9 \u1e9b\u0323",
    "漢字かな交じり文。한국어 中文，標點。",
    "Привет, мир! שלום עולם مرحبا नमस्ते ไทย",
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "\u200b\u200d\ufeff\u00a0\u2028\u3000",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff \U00010348",
    "\U00040000 \U0010ffff",  # some vocabularies lack the bytes
    "a" * 100,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s> [INST] text</s> more <unk> <pad><|endoftext|>",
    "before<|im_end|> after<|im_end|>\n\n after",
    "\x00\x01\x7f\x80\xad",
    "https://example.org/a_b-c?d=e%20f#g",
    "▁under▁bars ▁ <0x41> Ġ Ċ",
    '{"key": [1, 2.5, null, true], "text": "a\\nb"}',
]

CORPUS = [text for text in TEXTS if "<" not in text] * 3 + [
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the sun.",
    "She sells sea shells by the sea shore, and he is selling them at the market for 12.50 each.",
    "It is a truth universally acknowledged that a tokenizer in possession of a vocabulary must be in want of text.",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
    "There was nothing so very remarkable in that; nor did she think it so very much out of the way to hear it said.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
] * 5

CONVERSATIONS = {
    "single": [{"role": "user", "content": "  What is 2+2? <|im_end|> "}],
    "multi": [
        {"role": "user", "content": "Hi, I'm Zoë 🙂"},
        {"role": "assistant", "content": "Hello <b>Zoë</b> & co.\n"},
        {"role": "user", "content": "漢字?"},
    ],
    "system": [
        {"role": "system", "content": "You are a pirate.\nSay 'Arr'."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "Arr", "name": None},
        {"role": "user", "content": "Again"},
    ],
    "answered": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It is"}],
    "tool call": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather in Łódź?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Łódź", "days": 2}}}
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"t": 3.5}'},
        {"role": "assistant", "content": "3.5 degrees."},
        {"role": "user", "content": "Thanks"},
    ],
    "bad order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


def write(name: str, content: object) -> None:
    (HERE / name).write_text(json.dumps(content, indent=0, ensure_ascii=True) + "\n")


def cases(tokenizer, texts: list[str], size: int) -> list[dict]:
    """Encodings of the texts, then decodings of random ids."""
    out = []
    for text in texts:
        ids = tokenizer.encode(text)
        out.append({"text": text, "ids": ids, "bare": tokenizer.encode(text, add_special_tokens=False), **decodings(tokenizer, ids)})
    for seed in range(12):
        ids = random.Random(seed).choices(range(size), k=seed + 1)
        out.append({"ids": ids, **decodings(tokenizer, ids)})
    return out


def decodings(tokenizer, ids: list[int]) -> dict:
    return {"decoded": tokenizer.decode(ids, skip_special_tokens=True), "decoded_all": tokenizer.decode(ids, skip_special_tokens=False)}


def make_smollm2(gguf: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # transformers does not know the GGUF pre-tokenizer "smollm"; this is the one in the model's published tokenizer.json.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    write("smollm2.json", cases(tokenizer, TEXTS, 49152))


def make_byte_bpe() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>")
    folder = HERE / "byte_bpe"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        # Compact, as the pretty form is three times as long.
        content = json.loads(Path(scratch, "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
        shutil.copy(Path(scratch, "tokenizer_config.json"), folder)
    write("byte_bpe.json", cases(tokenizer, [*TEXTS, "a<think> b</think>"], len(tokenizer)))
    return tokenizer


def train_sentencepiece(kind: str) -> Path:
    folder = HERE / f"sentencepiece_{kind}"
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        split_digits=True,
        user_defined_symbols=["[INST]"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def make_sentencepiece() -> None:
    model = train_sentencepiece("bpe")
    out = []
    for config in (
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": False, "legacy": True},
        {"add_bos_token": True, "add_eos_token": True, "legacy": False},
        {"add_bos_token": False, "add_prefix_space": False},
    ):
        config = config | {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(model, scratch)
            Path(scratch, "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = LlamaTokenizer.from_pretrained(scratch)
            out.append({"config": config, "cases": cases(tokenizer, TEXTS, len(tokenizer))})
    write("sentencepiece_bpe.json", out)

    # transformers reads every tokenizer.model of a Llama folder as BPE, so sentencepiece itself is the reference for unigram. It takes
    # control tokens and byte pieces spelled in the text for plain text. A run of one letter has many best segmentations: left out.
    processor = sentencepiece.SentencePieceProcessor(model_file=str(train_sentencepiece("unigram")))
    texts = [text for text in TEXTS if "<" not in text and "aaaa" not in text]
    write(
        "sentencepiece_unigram.json",
        [{"text": t, "bare": processor.encode(t), "decoded": processor.decode(processor.encode(t))} for t in texts],
    )


def make_chat(tokenizer) -> None:
    out = []
    for file in sorted((HERE / "templates").glob("*.jinja")):
        for name, messages in CONVERSATIONS.items():
            for tools in (None, TOOLS) if "tools" in file.read_text() else (None,):
                for mode in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
                    if mode.get("continue_final_message") and (tools or name not in ("answered", "single")):
                        continue
                    case = {"template": file.name, "conversation": name, "tools": bool(tools), **mode}
                    try:
                        text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=file.read_text(), tokenize=False, **mode)
                    except Exception as error:
                        case["error"] = str(error)
                    else:
                        case["text"] = text
                    out.append(case)
    generation = (HERE / "templates" / "chatml-generation.jinja").read_text()
    masks = []
    for name in ("multi", "system", "answered"):
        encoded = tokenizer.apply_chat_template(
            CONVERSATIONS[name], chat_template=generation, return_assistant_tokens_mask=True, return_dict=True
        )
        masks.append({"conversation": name, "ids": encoded["input_ids"], "mask": encoded["assistant_masks"]})
    schemas = [get_json_schema(tool) for tool in TOOLS]
    write("chat.json", {"conversations": CONVERSATIONS, "rendered": out, "masks": masks, "tool_schemas": schemas})


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
    make_chat(make_byte_bpe())
    make_sentencepiece()
