"""Small training files and a small tokenizer, shared by the tests of the data."""

import json
import random
from functools import cache
from pathlib import Path

import tokenizers

from jaxllm.tokenizers import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "goldens" / "tokenizers" / "templates"
BYTE_BPE = Path(__file__).parents[1] / "goldens" / "tokenizers" / "byte_bpe"

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@cache
def make_tokenizer(
    template: str, eos: str = "</s>", bos: str = "<s>", special: tuple[str, ...] = (), ends: tuple[str, ...] = ()
) -> Tokenizer:
    """The byte-level vocabulary of the goldens with a family's special tokens and chat template. `ends`: further end tokens."""
    backend = tokenizers.Tokenizer.from_file(str(BYTE_BPE / "tokenizer.json"))
    backend.add_special_tokens([token for token in (eos, bos, *special, *ends) if token])
    return Tokenizer(
        backend,
        special_tokens={"eos_token": eos, "bos_token": bos},
        chat_templates={"default": (TEMPLATES / template).read_text()},
        extra_eos_token_ids=[backend.token_to_id(token) for token in ends],
    )


def plain_tokenizer() -> Tokenizer:
    return make_tokenizer("smollm2.jinja", eos="<|im_end|>", bos="<|im_start|>")


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


def make_records(count: int, seed: int = 0, longest: int = 30) -> list[dict]:
    """Completions of various lengths, each with its number in it, so that every example is known again."""
    generator = random.Random(seed)
    words = ["red", "blue", "tree", "house", "1", "22", "é", "\n"]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, longest))) for _ in range(count)]
    return [{"prompt": f"<{seed}:{i}> ", "completion": text} for i, text in enumerate(texts)]
