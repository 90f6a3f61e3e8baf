"""response_format and structured_outputs through the official client."""

import json

import openai
import pydantic
import pytest
from servers import serving, settled

CHAT = [{"role": "user", "content": "Who?"}]


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=6)
    age: int = pydantic.Field(ge=0, le=99)


SCHEMA = Person.model_json_schema()


def test_parse_gives_an_object(client, llm):
    answer = client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Person, seed=1, max_tokens=90, temperature=0.8)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Person)
    settled(llm)


def test_streamed_json_is_the_same_as_whole(client):
    asked = dict(model="tiny", messages=CHAT, max_tokens=90, seed=2, n=2)
    asked["extra_body"] = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole and texts[0] != texts[1]
    [Person.model_validate_json(text) for text in texts]


def test_the_other_forms(client):
    asked = dict(model="tiny", prompt="x", seed=3, max_tokens=40)
    text = lambda **extra: client.completions.create(**asked, extra_body=extra).choices[0].text
    assert text(structured_outputs={"choice": ["left", "right"]}) in ("left", "right")
    assert text(structured_outputs={"regex": "[0-9]{3}"}).isdigit()
    assert text(response_format={"type": "json_object"}).lstrip().startswith("{")
    small = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, "a"]}, "strict": True}}
    assert json.loads(text(response_format=small)) in (1, "a")
    assert text(response_format={"type": "text"})


@pytest.mark.parametrize(
    "extra, what",
    [
        ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
        ({"structured_outputs": {"regex": "(" * 3000 + ")" * 3000}}, "invalid regex"),
        ({"structured_outputs": {"json": {"type": "objec"}}}, "Invalid type"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "nothing"),
        ({"structured_outputs": {"json": "[" * 100_000}}, "nested so deep"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "must be one of"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "json_schema must be there"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "give one"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}, "allows no text at all"),
    ],
)
def test_what_is_wrong_with_them_is_said(client, extra, what):
    with pytest.raises(openai.BadRequestError, match=what):
        client.completions.create(model="tiny", prompt="x", extra_body=extra)


def test_thoughts_come_before_the_structure(llm):
    """The marks are wanted by a bias, which stands in for a model that was taught to think."""
    mark = llm.get_tokenizer().backend.token_to_id("<think>")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 22]}, "strict": True}}
    with serving(llm, reasoning_parser="think") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        asked = dict(model="tiny", messages=CHAT, response_format=schema, max_tokens=30, seed=1)
        plain = client.chat.completions.create(**asked, logit_bias={str(mark): -100}).choices[0]
        assert json.loads(plain.message.content) in (1, 22) and plain.finish_reason == "stop"
        thinking = client.chat.completions.create(**asked, logit_bias={str(mark): 100}).choices[0].message
        assert thinking.reasoning_content and not thinking.content  # it thinks on and on, in words that are no JSON
        closed = client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"think": True}}).choices[0].message
        assert closed.reasoning_content and not closed.content
