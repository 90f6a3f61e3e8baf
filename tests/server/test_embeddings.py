"""/v1/embeddings, through OpenAI's client."""

import asyncio
import base64
import json

import numpy as np
import openai
import pytest

from jaxllm.serving.pooling import embedding_params


def direct(llm, ids, pooling="last"):
    async def run():
        prompt = {"prompt_token_ids": ids, "pooling": pooling}
        return [output async for output in llm.generate(prompt, embedding_params())][-1].embedding

    return asyncio.run(run())


def test_every_form_of_input(client, llm):
    tokenizer = llm.get_tokenizer()
    texts = ["once upon a time", "The quick brown fox " * 20]
    ids = [tokenizer.encode(text) for text in texts]
    wanted = [direct(llm, each) for each in ids]
    for given in (texts, ids):
        answer = client.embeddings.create(model="tiny", input=given)  # the client asks for base64
        assert [item.index for item in answer.data] == [0, 1]
        np.testing.assert_allclose([item.embedding for item in answer.data], wanted, atol=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    for given in (texts[0], ids[0]):
        (item,) = client.embeddings.create(model="tiny", input=given, encoding_format="float", dimensions=32).data
        np.testing.assert_allclose(item.embedding, wanted[0], atol=1e-5)
        assert abs(np.linalg.norm(item.embedding) - 1) < 1e-5


def test_base64_and_mean(client, llm):
    answer = client.embeddings.with_raw_response.create(
        model="tiny", input="once upon", encoding_format="base64", extra_body={"pooling": "mean"}
    )
    text = json.loads(answer.text)["data"][0]["embedding"]
    ids = llm.get_tokenizer().encode("once upon")
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(text), "<f4"), direct(llm, ids, "mean"), atol=1e-5)
    assert not np.allclose(direct(llm, ids, "mean"), direct(llm, ids), atol=1e-2)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "extra_body": {"pooling": "max"}}, "pooling"),
        ({"input": "a", "extra_body": {"truncate_prompt_tokens": 3}}, "truncate_prompt_tokens"),
    ],
)
def test_refused_by_name(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", **body)
    assert caught.value.param == param


def test_too_long_and_unknown_tokens(client):
    for ids, said in (([5] * 2000, "max_model_len"), ([10**6], "token ids")):
        with pytest.raises(openai.BadRequestError, match=said):
            client.embeddings.create(model="tiny", input=ids)


def test_nothing_was_compiled(client, llm):
    client.embeddings.create(model="tiny", input=["a b c " * n for n in (1, 30, 100)], extra_body={"pooling": "mean"})
    assert llm.figures.compiles_after_warmup == 0
