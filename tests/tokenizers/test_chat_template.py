"""Chat templates: rendered text, assistant masks and tool schemas equal transformers'; wrong requests are refused by name."""

import json

import pytest
from example_tools import TOOLS
from tokenizer_goldens import GOLDENS, golden

from jaxllm.errors import RequestError, TokenizerError
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.tool_schema import function_schema

CHAT = golden("chat.json")
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDENS / "byte_bpe")


def template(name: str) -> str:
    return (GOLDENS / "templates" / name).read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDENS / "templates").glob("*.jinja")))
def test_rendering_equals_transformers(tokenizer, name):
    cases = [case for case in CHAT["rendered"] if case["template"] == name]
    assert len(cases) >= 12
    for case in cases:
        options = {key: case.get(key, False) for key in ("add_generation_prompt", "continue_final_message")}
        options |= {"tools": TOOLS if case["tools"] else None, "chat_template": template(name), "tokenize": False}
        messages = CHAT["conversations"][case["conversation"]]
        if "error" in case:
            with pytest.raises(TokenizerError) as error:
                tokenizer.apply_chat_template(messages, **options)
            assert case["error"] in str(error.value)
        else:
            text = tokenizer.apply_chat_template(messages, **options)
            assert text == case["text"], case
            ids = tokenizer.apply_chat_template(messages, **{**options, "tokenize": True})
            assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_assistant_masks_equal_transformers(tokenizer):
    for case in CHAT["masks"]:
        ids, mask = tokenizer.apply_chat_template(
            CHAT["conversations"][case["conversation"]],
            chat_template=template("chatml-generation.jinja"),
            add_generation_prompt=False,
            return_assistant_mask=True,
        )
        assert ids == case["ids"] and mask == case["mask"]
        assert 0 < sum(mask) < len(mask)


def test_mask_reaches_the_last_bytes_of_a_character(tokenizer):
    # Four byte tokens of one character; transformers' mask would stop at the first.
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    message = {"role": "assistant", "content": "x\U000e0041"}
    ids, mask = tokenizer.apply_chat_template([message], chat_template=source, return_assistant_mask=True)
    assert len(ids) == 5 and mask == [1] * 5


def test_tool_schemas_equal_transformers():
    assert [function_schema(tool) for tool in TOOLS] == [
        # transformers leaves the docstring's line breaks in "return"; so do we
        json.loads(json.dumps(schema))
        for schema in CHAT["tool_schemas"]
    ]


def test_smollm2_from_gguf_has_its_template(smollm2):
    ids = smollm2.apply_chat_template([USER])
    text = smollm2.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3


@pytest.mark.parametrize(
    ("messages", "culprit"),
    [
        ("hi", "messages must be a list"),
        ([], "messages is empty"),
        ([USER, "hi"], r"messages\[1\] must be a dict"),
        ([USER, {"content": "x"}], r"messages\[1\] needs a 'role'"),
        ([USER, {"role": "user"}], r"messages\[1\] .*'content'"),
        ([USER, {"role": "user", "content": 3}], r"messages\[1\]\['content'\] must be"),
        ([{"role": "user", "content": [{"type": "image", "image": object()}]}], r"messages\[0\]\['content'\]\[0\]\['image'\] is a object"),
    ],
)
def test_malformed_messages_are_named(tokenizer, messages, culprit):
    with pytest.raises(RequestError, match=culprit):
        tokenizer.apply_chat_template(messages, chat_template=template("zephyr.jinja"))


def test_malformed_options_are_named(tokenizer):
    def undescribed(x: int):
        """Does it."""

    zephyr = template("zephyr.jinja")
    for options, error, culprit in [
        ({"continue_final_message": True}, RequestError, "add_generation_prompt"),
        ({"return_assistant_mask": True}, TokenizerError, "{% generation %}"),
        ({"return_assistant_mask": True, "tokenize": False}, RequestError, "tokenize=True"),
        ({"tools": [3]}, RequestError, r"tools[0]"),
        ({"tools": [undescribed]}, RequestError, "Argument 'x' of tool undescribed"),
        ({"documents": ["x"]}, RequestError, "documents[0]"),
        ({"chat_template": "{% for %}"}, TokenizerError, "not valid Jinja"),
        ({"chat_template": None}, TokenizerError, "chat_template.jinja"),
    ]:
        with pytest.raises(error) as caught:
            tokenizer.apply_chat_template([USER], **{"chat_template": zephyr, **options})
        assert culprit in str(caught.value)


def test_templates_run_in_a_sandbox(tokenizer):
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}"):
        with pytest.raises(TokenizerError, match="refused"):
            tokenizer.apply_chat_template([USER], chat_template=source)
    conversation = [dict(USER)]
    tokenizer.apply_chat_template(conversation, chat_template="{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') }}")
    assert conversation == [USER]


def test_variables(tokenizer):
    source = "{{ bos_token }}|{{ eos_token }}|{{ flag }}|{{ documents[0].title }}|{{ {'a<': 'é'} | tojson(indent=1) }}|{{ unk_token }}"
    text = tokenizer.apply_chat_template(
        [USER], chat_template=source, tokenize=False, flag=[1], eos_token="E", documents=[{"title": "T", "text": "t"}]
    )
    assert text == '<s>|E|[1]|T|{\n "a<": "é"\n}|'
