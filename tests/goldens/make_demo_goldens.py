"""Write tests/goldens/demo.json: what transformers does with the demo model, SmolLM2-135M-Instruct in GGUF Q4_1.

    HF_PYTHON tests/goldens/make_demo_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf [--out tests/goldens/demo.json]

The weights are dequantised to float32 (eager attention, CPU). "prompts": for each, the text, its token ids, 48 greedy tokens (cached
decoding, end of sequence ignored), their decoded text (special tokens kept), `gaps` (best minus second logit at every step: a
float32 implementation may part ways where one is tiny) and `margin`, the smallest. "conversations": messages, the rendered string
and its ids.

transformers drops the GGUF's `tokenizer.ggml.pre` ("smollm": every digit is a pre-token of its own, and so ends the run of spaces
before it), and so does any tokenizer.json it converts from the GGUF. The original tokenizer splits digits, as llama.cpp does; `token_ids`
are the original's, and `token_ids_without_digit_split` is there where the conversion differs.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

NEW_TOKENS = 48

STORY = (
    "The lighthouse keeper woke before dawn, as she had every day for thirty years, and climbed the spiral stairs with a lamp in one hand "
    "and a tin cup of coffee in the other. Below her the sea was the colour of slate. "
    "A fishing boat named Marguerite had gone out at midnight and had not come back. "
)
LONG = STORY + " ".join(
    f"In year {1890 + n}, the log says, the {kind} came on day {n * 7 % 30 + 1}; the wind was {wind}, the barometer read "
    f"{29 + n / 10:.1f} inches, and {n + 2} boats were safe in the harbour by nightfall."
    for n, (kind, wind) in enumerate(
        zip(
            ["storm", "fog", "ice", "calm", "gale", "rain", "swell", "snow", "mist"],
            ["northerly", "light", "bitter", "still"] * 3,
            strict=False,
        )
    )
)
CODE = '''def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number."""
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)


def factorial(n: int) -> int:
    """Return n!"""
'''
TABLE = "Item        Price\nApples         12\nPears           7\nPlums         105\nTotal        "


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Plain strings are completed; lists of messages go through the chat template with a generation prompt.
PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "sentence": "The capital of France is",
    "one word": "Once",
    "story": STORY + "She looked at the horizon and",
    "code": CODE,
    "table": TABLE,
    "emoji and cjk": (
        "Greetings from around the world: 你好，世界！ こんにちは 🌍👋🏽 안녕하세요 — naïve café, Ελληνικά, 👨‍👩‍👧. In English, this means"
    ),
    "long": LONG + "\n\nIn short, the keeper",
    "chat": user("What is the largest planet in the solar system?"),
    "chat code": user("Write a Python function that reverses a string. Explain it in one sentence. 🙂"),
    "chat long": user("Summarise this log in two sentences:\n\n" + LONG),
}
SYSTEM = {"role": "system", "content": "You are a pirate.  Answer in one line."}
TURNS = [
    {"role": "user", "content": "Hi! My name is Zoë 🦜."},
    {"role": "assistant", "content": "Ahoy, Zoë!"},
    {"role": "user", "content": "What is 12 + 30?\n\n\tThink  first."},
]
CONVERSATIONS: list[tuple[list[dict[str, str]], bool]] = [
    (user("Hello"), True),
    (user("Hello"), False),
    ([SYSTEM, *user("Where is the treasure?")], True),
    ([SYSTEM, *TURNS], True),
    (TURNS, True),
    ([*TURNS, {"role": "assistant", "content": "42 <|im_end|> "}], False),
]


def original_tokenizer(converted: Tokenizer) -> Tokenizer:
    """The converted tokenizer with the digit splitting that the original has in front of its byte-level splitting."""
    tokenizer = Tokenizer.from_str(converted.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return tokenizer


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> tuple[list[int], list[float]]:
    """(tokens, gaps), both of length `NEW_TOKENS`."""
    cache, feed, tokens, gaps = DynamicCache(config=model.config), ids, [], []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        (best, second), (token, _) = (part.tolist() for part in torch.topk(logits, 2))
        tokens.append(token)
        gaps.append(round(best - second, 4))
        feed = [token]
    return tokens, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description="write the goldens of the demo model")
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo.json")
    args = parser.parse_args()
    source = dict(pretrained_model_name_or_path=args.gguf.parent, gguf_file=args.gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    chat = AutoTokenizer.from_pretrained(**source)
    converted = chat._tokenizer
    original = original_tokenizer(converted)

    def ids_of(text: str) -> dict[str, list[int]]:
        ids, other = original.encode(text).ids, converted.encode(text).ids
        assert original.decode(ids, skip_special_tokens=False) == text, text
        return {"token_ids": ids} | ({} if ids == other else {"token_ids_without_digit_split": other})

    prompts = []
    for name, prompt in PROMPTS.items():
        text = prompt if isinstance(prompt, str) else chat.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        entry = {"name": name, "text": text} | ({} if isinstance(prompt, str) else {"messages": prompt}) | ids_of(text)
        tokens, gaps = greedy(model, entry["token_ids"])
        prompts.append(
            entry | {"greedy": tokens, "greedy_text": original.decode(tokens, skip_special_tokens=False), "margin": min(gaps), "gaps": gaps}
        )
        print(name, len(entry["token_ids"]), min(gaps), repr(prompts[-1]["greedy_text"]), flush=True)
    conversations = []
    for messages, add in CONVERSATIONS:
        text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        conversations.append({"messages": messages, "add_generation_prompt": add, "text": text} | ids_of(text))
    model_facts = {"file": args.gguf.name, "dtype": "float32", "eos_token_id": model.config.eos_token_id}
    content = {"model": model_facts, "chat_template": chat.chat_template, "prompts": prompts, "conversations": conversations}
    args.out.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
