"""Requests that are wrong in every way that could be thought of: each is answered with 4xx and a reason, and a stream beside
them does not notice."""

import http.client
import json
import threading
from urllib.parse import urlsplit

import jsonschema
import openai
import pytest
from servers import settled

BASE = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
DEEP = "[" * 100_000 + "]" * 100_000
# As JSON, for Python's own numbers do not go so far.
VALUES = [
    '"text"', '""', '"\\ud800"', '"\\u0000"', "-1", "0", "1", "0.5", "1e999", "-1e999", "1e-400", str(10**30), str(-(10**30)), str(2**63),
    "true", "false", "[]", "{}", "[[]]", "[null]", "[-1]", f"[{10**30}]", '[""]', '["\\ud800"]', '[1, "a"]', '{"a": 1}', '{"1": 1000}',
    '{"-1": 1}', '{"type": "x"}', "[true]", "[" * 150 + "]" * 150, '"' + "x" * 20_000 + '"',
]  # fmt: skip
RAW = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"text"', b"{]", b"{'prompt': 'x'}", b'{"prompt": "x",}', b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x" "n": 1}', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\x01"}',
    b'{"prompt": "\\x"}', b'{"prompt": "\\ud800"}', b'{"prompt": "x"} {}', b"prompt=x", b"<xml/>", DEEP.encode(),
    b'{"prompt": ' + DEEP.encode() + b"}", b'{"a":' * 50_000, b"\x00" * 100, b'\xef\xbb\xbf{"prompt": "x"}', b"0" * 10_000,
    b'{"prompt": "x", "n": 1e5000}', b'{"prompt": "x", "n": 01}', b'{"prompt": "x", "seed": 1.0e}', b'{"prompt": "x"',
]  # fmt: skip


@pytest.fixture(scope="module")
def post(server):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)

    def post(path, raw):
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, {} if answer.headers["Content-Type"].startswith("text/event-stream") else json.loads(text)

    yield post
    connection.close()


@pytest.fixture(scope="module")
def document(server):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    connection.request("GET", "/openapi.json")
    return json.loads(connection.getresponse().read())


@pytest.fixture(autouse=True)
def beside(client, llm):
    """A stream that goes on all the while, always with the same text."""
    asked = dict(model="tiny", prompt="The quick", max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True})
    own = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0)
    stream = lambda: "".join(chunk.choices[0].text for chunk in own.completions.create(**asked))
    expected, texts, stop = stream(), [], threading.Event()

    def go_on():
        while not stop.is_set():
            texts.append(stream())

    thread = threading.Thread(target=go_on)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert texts and set(texts) == {expected}
    settled(llm)


def check_refused(status, answer):
    assert 400 <= status < 500, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert 8 < len(error["message"]) < 2000 and "pydantic" not in error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize("path", BASE)
def test_bodies_that_are_not_json_objects(post, path):
    for raw in RAW:
        if path == "/v1/chat/completions" or path == "/detokenize" or not raw.startswith(b"\xef\xbb\xbf"):
            check_refused(*post(path, raw))


@pytest.mark.parametrize("path", BASE)
def test_wrong_values_of_every_field(post, path, document):
    """The published schema is the judge of what is wrong; what it allows may be refused too, but never breaks anything."""
    ref = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator(ref | {"components": document["components"]})
    fields = list(document["components"]["schemas"][ref["$ref"].rpartition("/")[2]]["properties"])
    counts = {"refused": 0, "served": 0}
    for field in [*fields, "no_such_field"]:
        for value in VALUES:
            raw = json.dumps(BASE[path])[:-1] + f', "{field}": {value}}}'
            status, answer = post(path, raw.encode())
            if status == 200:
                assert validator.is_valid(json.loads(raw)), (field, value[:100], "the schema refuses it")
                counts["served"] += 1
                continue
            counts["refused"] += 1
            error = check_refused(status, answer) if status != 404 else answer["error"]
            if not _cannot_be_read(value):
                part_of_prompt = field in ("tokens", "messages", "prompt", "input", "instructions")
                told = part_of_prompt or field in error["message"] or (error["param"] or "").startswith(field)
                assert told, (field, value[:100], error)
    assert counts["refused"] > len(fields) * 15 and counts["served"] > 0, counts


def _cannot_be_read(value: str) -> bool:
    return "\\ud800" in value or "e999" in value


def test_paths_and_methods(server, post):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    for method, path in [("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("PUT", "/tokenize"), ("GET", "/v1"), ("POST", "/v1/chat"),
                         ("GET", "/%00"), ("GET", "/../../etc/passwd"), ("GET", "/v1/models/%ff"), ("PATCH", "/")]:  # fmt: skip
        connection.request(method, path)
        answer = connection.getresponse()
        assert 400 <= answer.status < 500 and json.loads(answer.read())["error"]["message"], (method, path)
    connection.close()
