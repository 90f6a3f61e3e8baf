"""Tools and thoughts through the official client. A grammar stands in for a model that was taught to call."""

import json

import openai
import pytest
from servers import CHATML, serving

CHAT = [{"role": "user", "content": "Rain?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
ASKED = dict(model="tiny", messages=CHAT, tools=[WEATHER, NOW], seed=4)
TAUGHT = r"""
start: "Well. " call call?
call: "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"" /[a-z]{2}/ "\", \"days\": 3}}</tool_call>\n"
"""


def collect(stream):
    """A streamed answer put together, and its deltas with calls."""
    content, calls, reason, deltas = "", {}, None, []
    for chunk in stream:
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
        content += delta.content or ""
        for call in delta.tool_calls or ():
            deltas.append(call)
            if call.id:
                assert call.index not in calls and call.type == "function"
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
    return content, [tuple(call) for call in calls.values()], reason, deltas


def told(message):
    return message.content or "", [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def test_a_model_that_calls(client):
    asked = ASKED | {"extra_body": {"structured_outputs": {"grammar": TAUGHT}}}
    choice = client.chat.completions.create(**asked).choices[0]
    content, calls = told(choice.message)
    assert content == "Well." and calls and choice.finish_reason == "tool_calls"
    assert all(name == "weather" and json.loads(arguments)["days"] == 3 for name, arguments in calls)
    streamed = collect(client.chat.completions.create(**asked, stream=True))
    assert streamed[:3] == (content, calls, "tool_calls") and len(streamed[3]) > 2 * len(calls), "arguments come in pieces"
    alone = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert told(alone.message)[1] == calls[:1]
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert "<tool_call>" in none.message.content and none.message.tool_calls is None and none.finish_reason == "stop"


def test_a_model_that_answers_instead(client):
    answer = client.chat.completions.create(**ASKED, max_tokens=20, temperature=0)
    streamed = collect(client.chat.completions.create(**ASKED, max_tokens=20, temperature=0, stream=True))
    assert told(answer.choices[0].message) == streamed[:2] and streamed[1] == [] and streamed[2] == answer.choices[0].finish_reason


@pytest.mark.parametrize("seed", range(4))
def test_required_and_named(client, seed):
    asked = ASKED | {"seed": seed}
    choice = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
    content, [(name, arguments)] = told(choice.message)
    assert content == "" and name in ("weather", "now") and choice.finish_reason == "tool_calls"
    arguments = json.loads(arguments)
    assert arguments == {} if name == "now" else set(arguments) == {"city", "days"}
    streamed = collect(client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False, stream=True))
    assert streamed[1] == told(choice.message)[1]
    named = {"type": "function", "function": {"name": "weather"}}
    choice = client.chat.completions.create(**asked, tool_choice=named, n=2).choices[1]
    [(name, arguments)] = told(choice.message)[1]
    assert name == "weather" and json.loads(arguments)["city"] in ("Bern", "Rome") and choice.finish_reason == "stop"


def test_several_answers_with_calls_stream_side_by_side(client):
    asked = ASKED | dict(n=3, tool_choice="required", max_tokens=200)
    whole = client.chat.completions.create(**asked).choices
    streamed = {i: [] for i in range(3)}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index].append(chunk)
        used = chunk.usage
    assert used.completion_tokens > 0
    for i, choice in enumerate(whole):
        content, calls, reason, _ = collect(streamed[i])
        assert (content, calls) == told(choice.message) and reason == choice.finish_reason
    assert len({str(told(choice.message)) for choice in whole}) > 1


def test_tools_whose_schemas_have_definitions(client):
    """As pydantic makes them of nested models."""
    city, of = {"enum": ["Bern", "Rome"]}, {"$ref": "#/$defs/city"}
    named = {"of": of, "enum": of, "const": of}  # names may be keywords
    tree = {"type": "object", "properties": named, "required": [*named], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": tree | {"$defs": {"city": city}}}} for name in ("sun", "rain")]
    for choice in ("required", {"type": "function", "function": {"name": "rain"}}):
        message = (
            client.chat.completions.create(**ASKED | {"tools": tools}, tool_choice=choice, parallel_tool_calls=False).choices[0].message
        )
        [(name, arguments)] = told(message)[1]
        assert name in ("sun", "rain") and json.loads(arguments).keys() == named.keys()
        assert all(value in city["enum"] for value in json.loads(arguments).values())


def test_a_conversation_with_calls_goes_on(client, server):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 1}'}}
    messages = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "Sun."}]
    answer = client.chat.completions.create(**ASKED | {"messages": messages, "max_tokens": 5})
    assert answer.usage.prompt_tokens > client.chat.completions.create(**ASKED, max_tokens=5).usage.prompt_tokens
    call["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments is not valid JSON"):
        client.chat.completions.create(**ASKED | {"messages": messages})


@pytest.mark.parametrize(
    "more, what",
    [
        ({"tool_choice": "auto", "tools": None}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "'other'"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "give one"),
        ({"tools": [WEATHER, WEATHER]}, "two of one name"),
        ({"tools": [{"type": "retrieval"}]}, r"tools\[0\]"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, r"tools\[0\].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
    ],
)
def test_what_is_wrong_with_tools_is_said(client, more, what):
    with pytest.raises(openai.BadRequestError, match=what):
        client.chat.completions.create(model="tiny", messages=CHAT, extra_body={"tools": [WEATHER]} | more)


def test_a_template_without_tools_and_a_server_without_a_parser_refuse_them(llm, monkeypatch):
    plain = CHATML[CHATML.index("{% for") :]
    with serving(llm, tool_call_parser="none") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            client.chat.completions.create(**ASKED)
    monkeypatch.setitem(llm.get_tokenizer().chat_templates, "default", plain)
    with serving(llm, tool_call_parser="hermes") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="says nothing of tools"):
            client.chat.completions.create(**ASKED)


def test_a_prompt_that_begins_the_thoughts(llm, monkeypatch):
    """As DeepSeek R1's: the model writes nothing but the end of its thoughts, and here not even that."""
    monkeypatch.setitem(llm.get_tokenizer().chat_templates, "default", CHATML + "{{ '<think>\n' if add_generation_prompt }}")
    with serving(llm) as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        asked = dict(model="tiny", messages=CHAT, temperature=0, max_tokens=12)
        message = client.chat.completions.create(**asked).choices[0].message
        assert message.content == "" and message.reasoning_content
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    with serving(llm, reasoning_parser="none") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        assert message.reasoning_content in client.chat.completions.create(**asked).choices[0].message.content
