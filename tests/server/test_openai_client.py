"""The official client against a real server, held to what the engine answers by itself."""

import asyncio

import openai
import pytest
from servers import serving, settled

from jaxllm import SamplingParams
from jaxllm.server.protocol.base import Sampling
from jaxllm.serving.sampling_params import PARAMETERS

PROMPT = "The quick brown fox"
GREEDY = dict(model="tiny", temperature=0, max_tokens=12)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def refused(call, *, status=400):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    return caught.value.body


def test_models_and_version(client, server, llm):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 2000)
    assert client.models.retrieve("tiny").id == "tiny"
    assert refused(lambda: client.models.retrieve("other"), status=404)["code"] == "model_not_found"


def test_a_completion_is_the_engines(client, ask, llm):
    expected = ask(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.outputs[0].text, expected.outputs[0].finish_reason)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    ids = client.completions.create(prompt=expected.prompt_token_ids, **GREEDY)
    assert ids.choices[0].text == choice.text
    assert ids.usage.prompt_tokens_details.cached_tokens == (len(expected.prompt_token_ids) - 1) // 4 * 4


def test_several_prompts_and_continuations_stream_as_they_answer(client):
    asked = dict(model="tiny", prompt=["One two", "Three"], n=2, seed=5, max_tokens=9, temperature=1.5)
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3] and len({choice.text for choice in whole.choices}) == 4
    texts, ends, used = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert ends[choice.index] is None and chunk.usage is None
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
        used = chunk.usage
    assert texts == [choice.text for choice in whole.choices] and ends == [choice.finish_reason for choice in whole.choices]
    assert (used.prompt_tokens, used.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_echo_and_logprobs_in_the_legacy_form(client, ask):
    expected = ask(PROMPT, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2))
    (choice,) = client.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 3}, echo=True, logprobs=2).choices
    assert choice.text == PROMPT + expected.outputs[0].text
    ids = expected.prompt_token_ids + expected.outputs[0].token_ids
    likely = [*expected.prompt_logprobs, *expected.outputs[0].logprobs]
    told = choice.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx([p[i].logprob for i, p in list(zip(ids, likely, strict=True))[1:]])
    assert "".join(told.tokens) == choice.text and told.text_offset[1] == len(told.tokens[0])
    assert all(told.tokens[i] in told.top_logprobs[i] and 2 <= len(told.top_logprobs[i]) <= 3 for i in range(1, len(ids)))
    alone = client.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 0}, echo=True, logprobs=2)
    assert alone.choices[0].text == PROMPT and alone.usage.completion_tokens == 0
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(told.token_logprobs[1 : len(expected.prompt_token_ids)])
    body = refused(lambda: client.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 0}))
    assert body["param"] == "max_tokens"


def test_echo_and_logprobs_stream_as_they_answer(client):
    asked = dict(prompt=[PROMPT, "Once"], **GREEDY | {"max_tokens": 4}, echo=True, logprobs=2)
    whole = client.completions.create(**asked, extra_body={"prompt_logprobs": 2}).choices
    texts, told = ["", ""], [{}, {}]
    for chunk in client.completions.create(**asked, stream=True, extra_body={"prompt_logprobs": 2}):
        (choice,) = chunk.choices
        assert hasattr(choice, "prompt_logprobs") == (not texts[choice.index]), "with the first piece alone"
        if hasattr(choice, "prompt_logprobs"):
            assert choice.prompt_logprobs == whole[choice.index].prompt_logprobs
        texts[choice.index] += choice.text
        for name, values in choice.logprobs.model_dump().items():
            told[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole]
    for streamed, choice in zip(told, whole, strict=True):
        expected = choice.logprobs.model_dump()  # (its offsets count the parts of a character that is several tokens)
        assert streamed.pop("text_offset")[: len(PROMPT.split())] == expected.pop("text_offset")[: len(PROMPT.split())]
        assert streamed == expected
    alone = dict(prompt=PROMPT, **GREEDY | {"max_tokens": 0}, echo=True, stream=True, stream_options={"include_usage": True})
    *pieces, last = client.completions.create(**alone, extra_body={"return_token_ids": True})
    assert "".join(piece.choices[0].text for piece in pieces) == PROMPT and pieces[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 0 and last.usage.total_tokens == last.usage.prompt_tokens
    assert not any(piece.choices[0].token_ids for piece in pieces)


def test_log_probabilities_of_a_chats_prompt_are_told_once(client):
    asked = dict(model="tiny", messages=CHAT, seed=1, n=2, max_tokens=3, extra_body={"prompt_logprobs": 1})
    whole = client.chat.completions.create(**asked).prompt_logprobs
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (told,) = [chunk.choices[0].prompt_logprobs for chunk in chunks if hasattr(chunk.choices[0], "prompt_logprobs")]
    assert told == whole and whole[0] is None and len(whole) > 5


def test_a_chat_whole_and_streamed(client, ask, llm):
    ids = llm.get_tokenizer().apply_chat_template(CHAT)
    expected = ask({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=10, logprobs=2)).outputs[0]
    asked = dict(model="tiny", messages=CHAT, temperature=0, max_completion_tokens=10, logprobs=True, top_logprobs=2)
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert choice.finish_reason == expected.finish_reason
    content = choice.logprobs.content
    logprobs = [p[i].logprob for i, p in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert [entry.logprob for entry in content] == pytest.approx(logprobs)
    assert b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace") == expected.text
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in content)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [expected.finish_reason]
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_parts_of_text_and_a_message_to_go_on_with(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    one = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_tokens=5)
    other = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a\nb"}], temperature=0, max_tokens=5)
    assert one.choices[0].message.content == other.choices[0].message.content
    begun = [*CHAT, {"role": "assistant", "content": "Because of"}]
    asked = dict(model="tiny", messages=begun, temperature=0, max_tokens=4)
    plain = client.chat.completions.create(**asked, extra_body={"continue_final_message": True})
    echoed = client.chat.completions.create(**asked, extra_body={"continue_final_message": True, "echo": True})
    assert echoed.choices[0].message.content == "Because of" + plain.choices[0].message.content
    begun[-1] = {"role": "assistant", "content": [{"type": "text", "text": "Because of"}]}
    in_parts = client.chat.completions.create(**asked, extra_body={"continue_final_message": True, "echo": True})
    assert in_parts.choices[0].message.content == echoed.choices[0].message.content


def test_stop_bias_and_seed(client):
    text = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stopped = client.completions.create(prompt=PROMPT, **GREEDY, stop=[text[4:6]]).choices[0]
    assert stopped.text == text[: text.index(text[4:6])] and stopped.finish_reason == "stop" and stopped.stop_reason == text[4:6]
    token = 300
    biased = client.completions.create(prompt=PROMPT, **GREEDY, logit_bias={str(token): 100}, extra_body={"return_token_ids": True})
    assert set(biased.choices[0].token_ids) == {token}
    hot = dict(model="tiny", prompt=PROMPT, temperature=2, max_tokens=12)
    one, same, other = (client.completions.create(**hot, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == same != other


def test_every_sampling_parameter_is_in_the_schema_and_reaches_the_engine(client):
    assert set(Sampling.model_fields) == {parameter.name for parameter in PARAMETERS}
    extra = {"top_k": 1, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True}
    extra |= {
        "bad_words": ["fox"],
        "skip_special_tokens": False,
        "allowed_token_ids": [300, 301, 302],
        "prompt_logprobs": 1,
        "truncate_prompt_tokens": 2,
    }
    extra |= {"return_token_ids": True, "include_stop_str_in_output": True, "stop_token_ids": [5], "cache_salt": "mine"}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, extra_body=extra)
    (choice,) = answer.choices
    assert set(choice.token_ids) <= {300, 301, 302} and len(choice.token_ids) == 6 and answer.usage.prompt_tokens == 2
    assert len(choice.prompt_logprobs) == 2 and len(choice.prompt_token_ids) == 2
    beams = client.completions.create(prompt=PROMPT, **GREEDY, n=2, extra_body={"use_beam_search": True, "beam_width": 3})
    assert len(beams.choices) == 2


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("max_tokns", 3, "max_tokns"),
        ("best_of", 2, "best_of"),
        ("suffix", "x", "suffix"),
        ("temperature", "warm", "temperature"),
        ("temperature", -1, "temperature"),
        ("top_p", 0, "top_p"),
        ("n", 10**9, "n"),
        ("logprobs", True, "logprobs"),
        ("prompt", {"text": "x"}, "prompt"),
        ("prompt", [["a"]], "prompt[0][0]"),
        ("stream_options", {"include_usage": True, "more": 1}, "stream_options.more"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("stop", [""], "stop"),
        ("stream", "yes", "stream"),
    ],
)
def test_what_is_wrong_is_named(client, field, value, param):
    body = refused(lambda: client.completions.create(**{"prompt": "x", **GREEDY}, extra_body={field: value}))
    assert body["param"] == param and field in body["message"] and body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae"),
        ({"messages": []}, None),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"functions": []}, "functions"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        ({"store": True}, "store"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ],
)
def test_what_is_wrong_with_a_chat_is_named(client, body, param):
    assert refused(lambda: client.chat.completions.create(model="tiny", messages=CHAT, extra_body=body))["param"] == param


def test_unknown_fields_may_be_warned_of(llm, caplog):
    with serving(llm, unknown_fields="warn") as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        extra = {"best_of": 2, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache": 1}], "x": 1}]}
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, extra_body=extra)
    warned = "\n".join(record.getMessage() for record in caplog.records if "not implemented" in record.getMessage())
    assert all(f"field {name}," in warned for name in ("best_of", "messages[0].x", "messages[0].content[0].cache"))


def test_a_client_that_leaves_ends_its_request(server, llm):
    """Streaming, waiting for the first token, and waiting for the whole answer."""
    client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    long = dict(model="tiny", prompt=PROMPT, temperature=0, max_tokens=100, extra_body={"ignore_eos": True})

    async def streams():
        stream = await client.completions.create(**long, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def waits(**more):
        task = asyncio.create_task(client.completions.create(**long, **more))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run():
        steps = llm.figures.steps
        await asyncio.gather(*(streams() for _ in range(3)), *(waits() for _ in range(3)), *(waits(stream=True) for _ in range(3)))
        return steps

    before = asyncio.run(run())
    settled(llm)
    assert llm.figures.steps - before < 9 * 100 / 4, "they would have taken that many steps to the end"


def test_many_clients_at_once_get_their_own_answers(server, client, llm):
    prompts = [f"{i} and {i + 1} are" for i in range(12)]
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]

    async def one(each, prompt):
        text = ""
        async for chunk in await each.completions.create(prompt=prompt, **GREEDY, stream=True):
            text += chunk.choices[0].text
        return text

    async def run():
        each = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
        return await asyncio.gather(*(one(each, prompt) for prompt in prompts))

    assert asyncio.run(run()) == alone
    settled(llm)
    assert llm.figures.compiles_after_warmup == 0
