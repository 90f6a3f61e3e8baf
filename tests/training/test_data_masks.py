"""The loss mask: in each family's template exactly what the assistant says and its end-of-turn token, in every turn, with tools too."""

import json

import numpy as np
import pytest
from data_files import TEMPLATES, TOOL, make_tokenizer, plain_tokenizer, write_jsonl

from jaxllm.errors import ConfigError, DataError
from jaxllm.training.data import DataConfig, make_dataset
from jaxllm.training.data.encode import Encoder

MULTI = [
    {"role": "user", "content": "Hi <b>you</b>"},
    {"role": "assistant", "content": "Hello, Zoë 🙂.\nWhat is it?"},
    {"role": "user", "content": "漢字?"},
    {"role": "assistant", "content": "Chinese characters."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Łódź"}}}
TOOLS = [
    {"role": "user", "content": "Weather in Łódź?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"t": 3.5}'},
    {"role": "assistant", "content": "3.5 degrees."},
]

CHATML = dict(eos="<|im_end|>", bos="<|im_start|>", special=("<|endoftext|>",))
FAMILIES = {
    "smollm2.jinja": CHATML,
    "qwen2.5.jinja": CHATML,
    "chatml-generation.jinja": CHATML,
    "llama-3.1.jinja": dict(
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        ends=("<|eom_id|>",),
    ),
    "mistral.jinja": dict(special=("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
    "gemma.jinja": dict(eos="<eos>", bos="<bos>", special=("<start_of_turn>",), ends=("<end_of_turn>",)),
    "phi-3.jinja": dict(eos="<|endoftext|>", special=("<|user|>", "<|assistant|>", "<|system|>"), ends=("<|end|>",)),
    "zephyr.jinja": dict(),
}
END = {"llama-3.1.jinja": "<|eot_id|>", "mistral.jinja": "</s>", "zephyr.jinja": "</s>", "gemma.jinja": "<end_of_turn>"} | {
    name: "<|im_end|>" for name in ("smollm2.jinja", "qwen2.5.jinja", "chatml-generation.jinja")
}
END["phi-3.jinja"] = "<|end|>"


def learned(tokenizer, messages, tools=None, **config) -> list[str]:
    """The runs of learned tokens, decoded; and the tokens must be those that serving would make of the conversation."""
    record = {"messages": messages} | ({"tools": tools} if tools else {})
    sequence = Encoder(tokenizer, DataConfig(path=("x",), **config))(record, "chat").sequences[0]
    assert sequence.ids.tolist() == tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.loss, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(sequence.ids[start:stop].tolist(), skip_special_tokens=False) for start, stop in runs]


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_the_assistant_says_is_learned(name):
    tokenizer = make_tokenizer(name, **FAMILIES[name])
    said = [message["content"] + END[name] for message in MULTI if message["role"] == "assistant"]
    assert learned(tokenizer, MULTI) == said
    assert learned(tokenizer, MULTI[:2]) == said[:1]
    assert learned(tokenizer, MULTI, loss_on=("last",)) == said[1:]
    if name == "mistral.jinja":  # it writes the system message only while a question comes last
        with pytest.raises(DataError, match=r"messages\[2\] \(role assistant\) otherwise"):
            learned(tokenizer, SYSTEM + MULTI)
    elif name == "gemma.jinja":  # it has no system role
        with pytest.raises(DataError, match="System role not supported"):
            learned(tokenizer, SYSTEM + MULTI)
    else:
        assert learned(tokenizer, SYSTEM + MULTI) == said


@pytest.mark.parametrize("name", ["qwen2.5.jinja", "llama-3.1.jinja", "mistral.jinja"])
def test_tool_calls_are_learned_and_their_results_are_not(name):
    tokenizer = make_tokenizer(name, **FAMILIES[name])
    calls, answer = learned(tokenizer, TOOLS, tools=[TOOL])
    assert answer == "3.5 degrees." + END[name]
    before = tokenizer.apply_chat_template(TOOLS[:1], tools=[TOOL], tokenize=False)
    after = tokenizer.apply_chat_template(TOOLS[:2], tools=[TOOL], add_generation_prompt=False, tokenize=False)
    assert after == before + calls + ("\n" if name == "qwen2.5.jinja" else "")
    assert "get_weather" in calls and "Łódź" in calls and "degrees" not in calls


def test_arguments_and_tools_as_json_text_are_the_same():
    tokenizer = make_tokenizer("qwen2.5.jinja", **CHATML)
    encoder = Encoder(tokenizer, DataConfig(path=("x",)))
    function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    as_text = [TOOLS[0], {**TOOLS[1], "tool_calls": [{**CALL, "function": function}]}, *TOOLS[2:]]
    a = encoder({"messages": TOOLS, "tools": [TOOL]}, "chat").sequences[0]
    b = encoder({"messages": as_text, "tools": json.dumps([TOOL])}, "chat").sequences[0]
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.loss, b.loss)


def test_chosen_roles_and_all():
    tokenizer = make_tokenizer("smollm2.jinja", **CHATML)
    assert learned(tokenizer, SYSTEM + MULTI[:2], loss_on=("user",)) == ["<|im_start|>user\nHi <b>you</b><|im_end|>\n"]
    both = learned(tokenizer, SYSTEM + MULTI[:2], loss_on=("system", "assistant"))
    assert both == ["<|im_start|>system\nBe brief.<|im_end|>\n", "Hello, Zoë 🙂.\nWhat is it?<|im_end|>"]
    everything = tokenizer.apply_chat_template(MULTI, add_generation_prompt=False, tokenize=False)
    assert learned(tokenizer, MULTI, loss_on=("all",)) == [everything]


def test_an_end_token_that_the_user_writes_changes_nothing():
    tokenizer = make_tokenizer("smollm2.jinja", **CHATML)
    messages = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nb"}, {"role": "assistant", "content": "c<|im_end|> d"}]
    assert learned(tokenizer, messages) == ["c<|im_end|> d<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    # Mistral's puts the tools before the last question: with two, the first answer was given to another text.
    tokenizer = make_tokenizer("mistral.jinja", **FAMILIES["mistral.jinja"])
    messages = [*TOOLS, {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Bye"}]
    with pytest.raises(DataError, match=r"messages\[1\] \(role assistant\) otherwise .* loss_on=last"):
        learned(tokenizer, messages, tools=[TOOL])
    assert learned(tokenizer, messages, tools=[TOOL], loss_on=("last",)) == ["Bye</s>"]
    # Templates of reasoning models drop it from earlier turns.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and m.thinking %}<think>"
        "{{ m.thinking }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thinking = [{**m, "thinking": "hm"} if m["role"] == "assistant" else m for m in MULTI]
    encoder = Encoder(plain_tokenizer(), DataConfig(path=("x",), chat_template=source))
    with pytest.raises(DataError, match=r"messages\[1\]"):
        encoder({"messages": thinking}, "chat")


def test_every_space_that_is_said_is_learned():
    tokenizer = make_tokenizer("chatml-generation.jinja", **CHATML)
    content = "  def f():\n\n        return  1  \n"
    for name in ("chatml-generation.jinja", "smollm2.jinja"):
        tokenizer = make_tokenizer(name, **CHATML)
        assert learned(tokenizer, [MULTI[0], {"role": "assistant", "content": content}]) == [content + "<|im_end|>"]
    encoder = Encoder(tokenizer, DataConfig(path=("x",)))
    sequence = encoder({"prompt": "a:", "completion": content}, "completion").sequences[0]
    assert tokenizer.decode(sequence.ids[sequence.loss].tolist()) == content


def test_prompt_and_completion(tmp_path):
    tokenizer = plain_tokenizer()
    encoder = Encoder(tokenizer, DataConfig(path=("x",)))
    sequence = encoder({"prompt": "What is 2+2?\n", "completion": "It is 4."}, "completion").sequences[0]
    assert tokenizer.decode(sequence.ids[sequence.loss].tolist(), skip_special_tokens=False) == "It is 4.<|im_end|>"
    assert tokenizer.decode(sequence.ids[~sequence.loss].tolist()) == "What is 2+2?\n"
    chat = encoder({"prompt": MULTI[:3], "completion": MULTI[3:]}, "completion").sequences[0]
    assert tokenizer.decode(chat.ids[chat.loss].tolist(), skip_special_tokens=False) == "Chinese characters.<|im_end|>"
    text = encoder({"text": "Once upon"}, "text").sequences[0]
    assert text.loss.all() and tokenizer.decode(text.ids.tolist(), skip_special_tokens=False) == "Once upon<|im_end|>"
    with pytest.raises(DataError, match="names roles, and a prompt as text has none"):
        Encoder(tokenizer, DataConfig(path=("x",), loss_on=("user",)))({"prompt": "a", "completion": "b"}, "completion")


def test_preference_pairs_and_kto(tmp_path):
    tokenizer = plain_tokenizer()
    pairs = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "five, I think"},
        {"chosen": MULTI, "rejected": [*MULTI[:3], {"role": "assistant", "content": "No idea."}]},
        {"prompt": MULTI[:1], "chosen": MULTI[1:2], "rejected": [{"role": "assistant", "content": "?"}]},
    ]
    config = DataConfig(path=(write_jsonl(tmp_path / "pairs.jsonl", pairs),), shuffle=False, epochs=1)
    batch = next(make_dataset(config, tokenizer, batch_size=4, max_length=256))
    said = {}
    for name, part in batch.items():
        assert part["tokens"].shape == (4, 256) and not part["weights"][3].any() and not part["segment_ids"][3].any()
        said[name] = [tokenizer.decode(part["targets"][i][part["weights"][i] > 0].tolist(), skip_special_tokens=False) for i in range(3)]
    assert said["chosen"] == ["4<|im_end|>", "Chinese characters.<|im_end|>", "Hello, Zoë 🙂.\nWhat is it?<|im_end|>"]
    assert said["rejected"] == ["five, I think<|im_end|>", "No idea.<|im_end|>", "?<|im_end|>"]
    records = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": MULTI[:1], "completion": MULTI[1:2], "label": 0}]
    config = DataConfig(path=(write_jsonl(tmp_path / "kto.jsonl", records),), shuffle=False, epochs=1)
    batch = next(make_dataset(config, tokenizer, batch_size=2, max_length=64))
    assert batch["labels"].tolist() == [True, False] and batch["labels"].dtype == bool and batch["tokens"].shape == (2, 64)


def test_templates_covered_are_those_there_are():
    assert {path.name for path in TEMPLATES.glob("*.jinja")} - set(FAMILIES) == {"indented.jinja"}  # not of any model


def test_configs_that_cannot_be():
    for wrong, message in [
        (dict(), "path"),
        (dict(path=("a",), loss_on=("all", "user")), "stand alone"),
        (dict(path=("a",), buckets=(8, 16)), "packing"),
        (dict(path=("a",), packing=False, buckets=(16, 8)), "growing"),
        (dict(path=("a",), epochs=0), "epochs"),
        (dict(path=("a",), packing_window=0), "packing_window"),
    ]:
        with pytest.raises(ConfigError, match=message):
            DataConfig(**wrong)
