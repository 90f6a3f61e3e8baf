"""/v1/messages through Anthropic's own client, held to what the same chat gives in OpenAI's form."""

import anthropic
import pytest
from servers import serving, settled
from test_tools_http import NOW, WEATHER

TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
    {"role": "user", "content": "Go on."},
]
ASKED = dict(model="tiny", max_tokens=12, messages=TURNS, system="Be brief.", extra_body={"temperature": 0})
TOOLS = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in (WEATHER, NOW)]


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server, api_key="none", max_retries=0)


def test_a_message_whole_and_streamed(claude, client, llm):
    chat = [{"role": "system", "content": "Be brief."}, TURNS[0], {"role": "assistant", "content": "So."}, TURNS[2]]
    expected = client.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=12)
    message = claude.messages.create(**ASKED)
    assert message.content[0].text == expected.choices[0].message.content and message.role == "assistant"
    assert message.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[expected.choices[0].finish_reason]
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == expected.usage.prompt_tokens
    assert message.usage.output_tokens == expected.usage.completion_tokens
    with claude.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (message.stop_reason, message.usage.output_tokens)
    counted = claude.messages.count_tokens(model="tiny", messages=TURNS, system="Be brief.")
    assert counted.input_tokens == expected.usage.prompt_tokens
    settled(llm)


def test_a_stop_sequence(claude):
    text = claude.messages.create(**ASKED).content[0].text
    stopped = claude.messages.create(**ASKED, stop_sequences=[text[3:5]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3:5])


def test_tools(claude):
    asked = ASKED | {"extra_body": {"temperature": 1}, "max_tokens": 200, "tools": TOOLS}
    message = claude.messages.create(**asked, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (use,) = message.content
    assert use.type == "tool_use" and use.name in ("weather", "now") and message.stop_reason == "tool_use"
    with claude.messages.stream(**asked, tool_choice={"type": "tool", "name": "weather"}) as stream:
        final = stream.get_final_message()
    assert final.content[0].name == "weather" and final.content[0].input["city"] in ("Bern", "Rome")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sun."}
    turns = [*TURNS, {"role": "assistant", "content": [use.model_dump(exclude_none=True, include={"type", "id", "name", "input"})]}]
    longer = claude.messages.count_tokens(model="tiny", messages=[*turns, {"role": "user", "content": [result]}], tools=TOOLS)
    assert longer.input_tokens > claude.messages.count_tokens(model="tiny", messages=TURNS, tools=TOOLS).input_tokens


def test_who_asks_and_what_failed_are_told(claude, server, llm, caplog):
    caplog.set_level("INFO", "jaxllm.access")
    claude.messages.create(**ASKED, metadata={"user_id": "somebody"})
    counted = {}
    for is_error in (False, True):
        use = {"type": "tool_use", "id": "a", "name": "now", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": "It is late.", "is_error": is_error}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        counted[is_error] = claude.messages.count_tokens(model="tiny", messages=turns, tools=TOOLS).input_tokens
    assert counted[True] > counted[False], "the model is told that it is an error"
    with serving(llm, api_key=("a",)) as (where, _), pytest.raises(anthropic.AuthenticationError) as caught:
        anthropic.Anthropic(base_url=where, api_key="b", max_retries=0).messages.create(**ASKED)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "authentication_error"
    assert any(record.getMessage().endswith("user='somebody'") for record in caplog.records)


@pytest.mark.parametrize(
    "more, what",
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"model": "other"}, "'other'"),
    ],
)
def test_errors_are_in_their_shape(claude, more, what):
    with pytest.raises(anthropic.APIStatusError, match=what) as caught:
        claude.messages.create(**ASKED | {"extra_body": more})
    assert caught.value.status_code in (400, 404) and caught.value.body["type"] == "error"
