"""/v1/responses, through OpenAI's client."""

import json
import time

import openai
import pytest
from pydantic import BaseModel
from servers import serving

ASK = dict(model="tiny", input="Rain?", temperature=0.0, max_output_tokens=12)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def events_of(client, **asked):
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def squeezed(events):
    """The types of events, without repeats."""
    kinds = [event.type.removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def test_text_is_the_chats(client):
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}],
        temperature=0,
        max_tokens=12,
    )
    answer = client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens and answer.usage.output_tokens == chat.usage.completion_tokens
    assert chat.choices[0].finish_reason == "length" and answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.metadata == {"a": "b"}
    part = {"type": "input_text", "text": "Rain?"}
    parts = client.responses.create(**ASK | {"input": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [part]}]})
    assert parts.output_text == answer.output_text
    stored = client.responses.retrieve(answer.id)
    assert stored.output_text == answer.output_text and stored.usage == answer.usage


def test_the_events_of_a_text(client):
    whole = client.responses.create(**ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    events = events_of(client, **ASK, include=["message.output_text.logprobs"], top_logprobs=2)
    assert squeezed(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    logprobs = whole.output[0].content[0].logprobs
    assert len(logprobs) == 12 and len(logprobs[0].top_logprobs) == 2
    assert [p.token for e in events if e.type == "response.output_text.delta" for p in e.logprobs] == [p.token for p in logprobs]


def test_calls_and_their_results(client):
    asked = dict(model="tiny", input="Rain?", tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=60)
    answer = client.responses.create(**asked)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Bern", "Rome") and answer.status == "completed"
    events = events_of(client, **asked)
    kinds = squeezed(events)
    middle = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *middle, "completed"]
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta") == done.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Dry."}
    by_id = client.responses.create(**ASK | {"input": [result], "previous_response_id": answer.id})
    by_items = client.responses.create(
        **ASK | {"input": [{"role": "user", "content": "Rain?"}, call.model_dump(exclude_none=True), result]}
    )
    assert by_id.output_text == by_items.output_text and by_id.usage.input_tokens == by_items.usage.input_tokens
    assert by_id.previous_response_id == answer.id


def test_a_schema(client):
    class Day(BaseModel):
        sunny: bool
        month: int

    asked = dict(model="tiny", input="Which day?", max_output_tokens=200, top_p=0.9, extra_body={"seed": 1})
    parsed = client.responses.parse(**asked, text_format=Day)
    assert parsed.status in ("completed", "incomplete")
    if parsed.status == "completed":
        assert isinstance(parsed.output_parsed, Day)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    asked = dict(model="tiny", input="?", text={"format": {"type": "json_schema", "name": "x", "schema": schema}}, temperature=0.0)
    answer = client.responses.create(**asked, max_output_tokens=100)
    with client.responses.stream(**asked, max_output_tokens=100) as stream:  # the client's own accumulation
        assert stream.get_final_response().output_text == answer.output_text
    assert json.loads(answer.output_text)["a"] in (1, 2) and answer.text.format.schema_["required"] == ["a"]


def test_background_and_cancel(client):
    asked = ASK | {"background": True}
    answer = client.responses.create(**asked)
    assert answer.status == "queued"
    deadline = time.monotonic() + 60
    while (now := client.responses.retrieve(answer.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert now.output_text == client.responses.create(**ASK).output_text and now.background
    long = client.responses.create(**asked | {"max_output_tokens": 1900, "temperature": 1.0})
    cancelled = client.responses.cancel(long.id)
    assert cancelled.status == "cancelled" and client.responses.retrieve(long.id).status == "cancelled"
    client.responses.delete(long.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(long.id)


def test_thoughts(llm):
    with serving(llm, reasoning_parser="think") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        asked = ASK | {"extra_body": {"chat_template_kwargs": {"think": True}}}  # the template opens a thought, which never ends
        events = events_of(client, **asked)
        middle = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
        assert squeezed(events) == ["created", "in_progress", *middle, "output_item.done", "incomplete"]
        answer = events[-1].response
        (thought,) = answer.output
        assert thought.type == "reasoning" and thought.status == "incomplete"
        assert thought.content[0].text == "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens <= answer.usage.output_tokens
        history = [{"role": "user", "content": "Hi"}, thought.model_dump(exclude_none=True), {"role": "assistant", "content": "Ho"}]
        assert client.responses.create(**ASK | {"input": [*history, {"role": "user", "content": "Rain?"}]}).status == "incomplete"


def test_stored_only_if_wanted_and_for_whom(llm, tmp_path):
    (tmp_path / "keys.yaml").write_text("ann: {key: a}\nbob: {key: b}\n")
    with serving(llm, api_key_file=str(tmp_path / "keys.yaml"), max_stored_responses=2) as (where, _):
        ann, bob = (openai.OpenAI(base_url=f"{where}/v1", api_key=key, max_retries=0) for key in "ab")
        unkept = ann.responses.create(**ASK, store=False)
        kept = ann.responses.create(**ASK)
        assert ann.responses.retrieve(kept.id).id == kept.id
        for client, name in ((ann, unkept.id), (bob, kept.id)):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(name)
        with pytest.raises(openai.BadRequestError) as caught:
            bob.responses.create(**ASK, previous_response_id=kept.id)
        assert caught.value.param == "previous_response_id"
        for _ in range(2):
            ann.responses.create(**ASK)
        with pytest.raises(openai.NotFoundError):
            ann.responses.retrieve(kept.id)  # two newer ones are there


@pytest.mark.parametrize(
    "more, param",
    [
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].image_url"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"background": True, "store": False}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"model": "other"}, "model"),
    ],
)
def test_refused_by_name(client, more, param):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.responses.create(**ASK | more)
    assert caught.value.param == param


def test_unknown_fields_of_items_and_tools_may_be_warned_of(llm, caplog):
    with serving(llm, unknown_fields="warn") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        item, tool = {"role": "user", "content": "Rain?", "mood": 1}, WEATHER | {"colour": "blue"}
        answer = client.responses.create(**ASK | {"input": [item], "tools": [tool], "extra_body": {"verbosity": "low"}})
    assert answer.usage.output_tokens == 12
    warned = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"field {name}," in warned for name in ("mood", "colour", "verbosity"))


def test_cancel_of_what_does_not_run(client):
    answer = client.responses.create(**ASK)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(answer.id)
