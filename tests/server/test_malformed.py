"""Requests that are wrong in every way that could be thought of: each is answered with 4xx and a reason, and a stream beside
them does not notice."""

import http.client
import json
import threading
import time
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
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
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
        for _ in range(2):  # within a second, though the machine may have been busy with something else once
            start = time.monotonic()
            connection.request("POST", path, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if (took := time.monotonic() - start) < 1:
                return answer.status, {} if answer.headers["Content-Type"].startswith("text/event-stream") else json.loads(text)
        raise AssertionError(f"{path} took {took:.2f} s with {raw[:300]}")

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
    assert answer.get("type") == "error" or set(error) == {"message", "type", "param", "code"}, "Anthropic's shape, or OpenAI's"
    assert error["type"] == "invalid_request_error"
    assert 8 < len(error["message"]) < 2000 and "pydantic" not in error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize("path", BASE)
def test_bodies_that_are_not_json_objects(post, path):
    for raw in RAW:
        if path in ("/v1/chat/completions", "/v1/messages", "/detokenize") or not raw.startswith(b"\xef\xbb\xbf"):
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
                part_of_prompt = field in ("tokens", "messages", "prompt", "input", "instructions", "system")
                told = part_of_prompt or field in error["message"] or (error.get("param") or "").startswith(field)
                assert told, (field, value[:100], error)
    assert counts["refused"] > len(fields) * 15 and counts["served"] > 0, counts


def _cannot_be_read(value: str) -> bool:
    return "\\ud800" in value or "e999" in value


def nested(depth, leaf):
    return leaf if depth == 0 else {"type": "object", "properties": {"a": nested(depth - 1, leaf)}, "required": ["a"]}


def choices(depth):
    return {"type": "string"} if depth == 0 else {"anyOf": [choices(depth - 1)] * 3}


def chain(length, link):
    """Definitions each of which is made of the next."""
    refs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": refs | {f"d{length}": {"type": "integer"}}}


def cycle(link):
    return {"$ref": "#/$defs/a", "$defs": {"a": link({"$ref": "#/$defs/a"})}}


def rules(length):
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(length)) + f'\nr{length}: "x"'


# Asks for more work, or for more of the stack, than there may be for one request.
SCHEMAS = [
    nested(150, {}), choices(9), chain(5000, lambda ref: ref), chain(4000, lambda ref: {"properties": {"a": ref}, "required": ["a"]}),
    chain(3000, lambda ref: {"anyOf": [ref, {"type": "null"}]}), chain(3000, lambda ref: {"allOf": [ref]}), cycle(lambda ref: ref),
    cycle(lambda ref: {"anyOf": [ref]}), cycle(lambda ref: {"allOf": [ref, {"type": "object"}]}), cycle(lambda ref: {"items": ref, **ref}),
    {"enum": list(range(50_000))}, {"enum": ["x" * 200_000]}, {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
    {"allOf": [{"properties": {f"p{i}_{j}": {} for j in range(20)}} for i in range(200)]}, {"$ref": "https://example.com/schema.json"},
    {"patternProperties": {f"^{'a' * i}.*b.*": {"type": "integer"} for i in range(1, 100)}}, {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "(?=a)a"}, {"type": "string", "pattern": "a{99999999999999}"}, {"type": "string", "pattern": "(" * 5000},
    {"type": "number", "minimum": 1e-300, "maximum": 1e300}, {"type": "integer", "multipleOf": 10**15 + 37}, {"type": "nothing"},
    {"type": "string", "pattern": "(ab)?" * 20_000}, {"patternProperties": {"(ab)?" * 20_000: {}}},
    {"type": "array", "minItems": 5, "maxItems": 4}, {"$ref": "#/$defs/none"}, {"type": "string", "minLength": 9, "maxLength": 1},
]  # fmt: skip
REGEXES = [
    "a{99999999999999}", "(?=a)a", r"(a)\1", "(" * 5000 + "a" + ")" * 5000, "a" * 200_000, "(ab)?" * 20_000, "(?<=a)b", "[z-a]", "*",
    "(a", r"\p{Nonsense}",
]  # fmt: skip
GRAMMARS = [
    rules(5000), "start: a\na: b\nb: a", "start: A\nA: B\nB: A", "start: " + "(" * 3000 + '"a"' + ")" * 3000, '%import ./../x\nstart: "a"',
    'root ::= ((("a"{1,1000}){1,1000}){1,1000})', "start: %json {", "", "start: nothing", 'start: "' + "x" * 200_000 + '"',
]  # fmt: skip
OTHERS = [
    {"choice": [f"choice {i}" for i in range(50_000)]}, {"choice": []}, {"choice": [""]}, {"json": "{"}, {"json": "[" * 100_000},
    {"structural_tag": "[" * 100_000}, {"structural_tag": {"structures": [], "triggers": ["<"]}}, {"regex": "a", "json": {}}, {},
    {"structural_tag": {"structures": [{"begin": "<f", "schema": chain(5000, lambda ref: ref), "end": ">"}], "triggers": ["<f"]}},
]  # fmt: skip
# These look no better, and can be done.
DONE = [
    {"regex": "(a+)+b"}, {"regex": "(a|a)*b"}, {"regex": "(.*)*(.*)*(.*)*x"},
    {"regex": "[ab]*a[ab]{30}"}, {"json": {"type": "string", "minLength": 10**9}},
    {"json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}}, {"json": nested(60, {"type": "integer"})},
    {"json": chain(50, lambda ref: {"prefixItems": [ref] * 4})}, {"json": {"enum": [f"value {i}" for i in range(5000)]}},
    {"grammar": 'start: s\ns: s s s | s s | "a" | '}, {"grammar": 'start: a{1000,1000}\na: b{1000,1000}\nb: "x"{1000,1000}'},
    {"grammar": rules(400)}, {"json": cycle(lambda ref: {"properties": {"x": ref}, "required": ["x"]})},
]  # fmt: skip


def test_grammars_that_are_made_to_explode(post, llm):
    base = BASE["/v1/completions"]
    for asked in [*({"json": s} for s in SCHEMAS), *({"regex": r} for r in REGEXES), *({"grammar": g} for g in GRAMMARS), *OTHERS]:
        error = check_refused(*post("/v1/completions", json.dumps(base | {"structured_outputs": asked}).encode()))
        assert "structured_outputs" in error["message"] or "recursion" in error["message"], error
    for asked in DONE:
        status, answer = post("/v1/completions", json.dumps(base | {"structured_outputs": asked}).encode())
        assert status == 200, (str(asked)[:100], answer)
    assert llm.restarts == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_schemas_that_are_made_to_explode_wherever_they_are(post, path, llm):
    for schema in SCHEMAS:
        if path == "/v1/chat/completions":
            more = [{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}]
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            more.append({"tools": [tool], "tool_choice": "required"})
        elif path == "/v1/responses":
            more = [{"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}]
            tool = {"type": "function", "name": "f", "parameters": schema}
            more.append({"tools": [tool], "tool_choice": {"type": "function", "name": "f"}})
        else:
            more = [{"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}]
        for each in more:
            status, answer = post(path, json.dumps(BASE[path] | each).encode())
            if status != 200 or each.get("tool_choice") not in ("required", {"type": "any"}):  # where some text precedes what has no end
                check_refused(status, answer)
    assert llm.restarts == 0


def test_paths_and_methods(server, post):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    for method, path in [("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("PUT", "/tokenize"), ("GET", "/v1"), ("POST", "/v1/chat"),
                         ("GET", "/%00"), ("GET", "/../../etc/passwd"), ("GET", "/v1/models/%ff"), ("PATCH", "/")]:  # fmt: skip
        connection.request(method, path)
        answer = connection.getresponse()
        assert 400 <= answer.status < 500 and json.loads(answer.read())["error"]["message"], (method, path)
    connection.close()
