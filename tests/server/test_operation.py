"""What an operator relies on: keys, limits, draining, ids, errors that reach whom they concern."""

import asyncio
import json
import logging
import shutil
import signal
import ssl
import subprocess
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest
from servers import call, serving, settled, start, until

from jaxllm import AsyncLLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.server.config import ServerConfig
from jaxllm.server.keys import Allowance, Client, KeySettings, current_client, read_keys
from jaxllm.server.run import check_tls, listen
from jaxllm.server.service import Service
from jaxllm.serving.news import figures_of

LONG = {"prompt": "The quick", "max_tokens": 100, "ignore_eos": True, "temperature": 0}


def test_health_version_and_load(server):
    assert call(server, "/health")[0] == call(server, "/ready")[0] == 200
    assert call(server, "/version")[2]["version"]
    assert call(server, "/load")[2] == {"server_load": 0}
    status, _, body = call(server, "/nowhere")
    assert status == 404 and body["error"]["message"] == "there is nothing at /nowhere"
    assert call(server, "/v1/completions")[0] == 405


def test_tokenize_and_back(server, llm):
    tokenizer = llm.get_tokenizer()
    _, _, body = call(server, "/tokenize", {"prompt": "Hello, world", "return_token_strs": True})
    assert body["tokens"] == tokenizer.encode("Hello, world") and body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert call(server, "/detokenize", {"tokens": body["tokens"]})[2] == {"prompt": "Hello, world"}
    messages = [{"role": "user", "content": "Why?"}]
    assert call(server, "/tokenize", {"messages": messages})[2]["tokens"] == tokenizer.apply_chat_template(messages)
    assert call(server, "/tokenize", {"prompt": "a", "messages": messages})[0] == 400
    assert call(server, "/detokenize", {"tokens": [10**6]})[0] == 400


def test_the_document_names_every_path_and_refers_to_nothing_that_is_not_there(server):
    _, _, document = call(server, "/openapi.json")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize"} <= set(document["paths"])
    refs = set()

    def walk(node):
        if isinstance(node, dict):
            refs.update([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            [walk(each) for each in node]

    walk(document)
    assert refs and all(ref.removeprefix("#/components/schemas/") in document["components"]["schemas"] for ref in refs)


def test_request_ids_and_the_access_log(server, caplog):
    caplog.set_level(logging.INFO, logger="jaxllm.access")
    _, headers, _ = call(server, "/tokenize", {"prompt": "secret words"}, {"X-Request-Id": "mine-1", "Authorization": "Bearer sesame"})
    assert headers["X-Request-Id"] == "mine-1"
    _, headers, _ = call(server, "/nowhere%0Aforged", None, {"X-Request-Id": "not ok!"})
    made = headers["X-Request-Id"]
    assert len(made) == 32
    call(server, "/v1/completions", {"prompt": "x", "max_tokens": 1, "user": "somebody"})
    time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "jaxllm.access"]
    assert "mine-1 127.0.0.1 POST /tokenize 200" in lines[0] and f"{made} 127.0.0.1 GET /nowhere?forged 404" in lines[1]
    assert lines[2].endswith("user='somebody'") and len(lines) == 3
    assert not any("secret" in line or "sesame" in line for line in lines)


def test_keys(llm):
    with serving(llm, api_key=("first", "second")) as (where, _):
        for path in ("/health", "/ready", "/version"):
            assert call(where, path)[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first"},
            {"X-Api-Key": "firs"},
            {"Authorization": "Bearer"},
        ):
            status, _, body = call(where, "/v1/models", None, headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key" and "first" not in str(body)
        for headers in ({"Authorization": "Bearer second"}, {"authorization": "bearer first"}, {"X-Api-Key": "first"}):
            assert call(where, "/v1/models", None, headers)[0] == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{where}/v1", api_key="no").models.list()


def test_keys_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAXLLM_API_KEY", "a,b")
    assert ServerConfig().keys == ("a", "b") and ServerConfig(api_key=("c",)).keys == ("c",)


def test_keys_with_names_and_limits(llm, tmp_path, monkeypatch, caplog):
    file = tmp_path / "keys.yaml"
    file.write_text("alice: {key: a, requests_per_minute: 2}\nbob: {key: b, tokens_per_minute: 10}\ncarol: {key: c}\n")
    tenants, generate = [], llm.generate
    monkeypatch.setattr(llm, "generate", lambda prompt, *more: tenants.append(prompt["tenant"]) or generate(prompt, *more))
    caplog.set_level("INFO", "jaxllm.access")
    with serving(llm, api_key=("z",), api_key_file=str(file)) as (where, _):

        def ask(key, max_tokens=2):
            return call(where, "/v1/completions", {"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True}, {"X-Api-Key": key})

        assert [ask(key)[0] for key in ("a", "a", "c", "z")] == [200] * 4 and tenants == ["alice", "alice", "carol", "key-0"]
        status, headers, body = ask("a")
        assert status == 429 and 25 <= int(headers["Retry-After"]) <= 30 and "requests_per_minute=2" in body["error"]["message"]
        assert ask("b", 30)[0] == 200
        status, headers, body = ask("b")
        assert status == 429 and int(headers["Retry-After"]) > 60 and body["error"]["code"] == "rate_limit_exceeded"
        assert call(where, "/tokenize", {"prompt": "x"}, {"X-Api-Key": "b"})[0] == 200  # what costs no step is not counted
        assert ask("c")[0] == 200
        stream = openai.OpenAI(base_url=f"{where}/v1", api_key="c", max_retries=0).completions.create
        assert list(stream(model="tiny", prompt="x", max_tokens=2, stream=True)) and tenants[-1] == "carol"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].endswith("client='alice'") and not any("key=" in line for line in lines)


def test_who_leaves_early_pays_for_the_prompt(llm):
    async def leave():
        service = Service(llm, ServerConfig())
        client = Client("ann", KeySettings(key="a", tokens_per_minute=1000))
        current_client.set(client)
        answer = asyncio.ensure_future(anext(service.run([{"prompt_token_ids": [5] * 400}], SamplingParams(max_tokens=5))))
        while not ((await llm.ask(figures_of)).requests or answer.done()):
            await asyncio.sleep(0)
        assert not answer.done()
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        return client._tokens.left

    assert asyncio.run(leave()) == pytest.approx(600, abs=20)  # a little has come back since


def test_a_minutes_worth_comes_back_in_a_minute():
    now = 0.0
    allowance = Allowance(60, clock=lambda: now)
    allowance.spend(90)
    assert allowance.seconds_until(1) == pytest.approx(31)
    now = 31.0
    assert allowance.seconds_until(1) == 0
    now = 1000.0
    assert allowance.seconds_until(60) == 0 and allowance.left == 60  # no more is saved up


@pytest.mark.parametrize(
    "text, what",
    [
        ("alice: a", "alice must have entries"),
        ("alice: {key: ''}", "key must not be empty"),
        ("alice: {kee: a}", "kee"),
        ("alice: {key: 12345}", "^((?!12345).)*key must be text[^1]*$"),
        ("alice: {key: a, requests_per_minute: 0}", "requests_per_minute must be at least 1"),
        ("{alice: {key: a}, bob: {key: a}}", "a key is there twice"),
        ("", "no key in it"),
    ],
)
def test_what_is_wrong_in_a_key_file(tmp_path, text, what):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_keys((), str(tmp_path / "keys.yaml"))


def test_limits(llm):
    with serving(llm, max_body_bytes=1000, max_pending=3, max_prompts=6, request_timeout=0.15) as (where, _):
        status, _, body = call(where, "/v1/completions", {"prompt": "x" * 2000})
        assert status == 413 and "max_body_bytes=1000" in body["error"]["message"]
        status, _, body = call(where, "/v1/completions", {"prompt": "x", "n": 7})
        assert status == 400 and body["error"]["param"] == "n"
        status, headers, body = call(where, "/v1/completions", {"prompt": ["x"] * 4, "max_tokens": 1})
        assert status == 429 and headers["Retry-After"] == "1" and body["error"]["type"] == "rate_limit_error"
        slow = LONG | {"n": 6, "temperature": 1.0, "max_tokens": 500}
        status, _, body = call(where, "/v1/completions", slow)
        assert status == 504 and body["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="request_timeout"):
            list(client.completions.create(model="tiny", prompt="x", n=6, max_tokens=500, stream=True, extra_body={"ignore_eos": True}))
        settled(llm)


def test_cross_origin_pages(server, llm):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in call(server, "/v1/completions", None, asked, "OPTIONS")[1]
    with serving(llm, allowed_origins=("https://page.example",)) as (where, _):
        assert "Access-Control-Allow-Origin" in call(where, "/v1/models", None, asked)[1]
        assert "Access-Control-Allow-Origin" not in call(where, "/v1/models", None, asked | {"Origin": "https://other.example"})[1]
    with serving(llm, allowed_origins=("https://page.example",), api_key=("a",)) as (where, _):
        preflight = urllib.request.Request(f"{where}/v1/completions", method="OPTIONS", headers=asked)
        assert urllib.request.urlopen(preflight).status == 200  # a browser asks this without a key
        status, headers, _ = call(where, "/v1/models", None, asked)
        assert status == 401 and headers["Access-Control-Allow-Origin"] and "X-Request-Id" in headers["Access-Control-Expose-Headers"]


def test_tls(llm, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate], check=True, capture_output=True)
    config = ServerConfig(tls_certificate=certificate, tls_key=key)
    check_tls(config)
    with serving(llm, tls_certificate=certificate, tls_key=key) as (where, _):
        assert where.startswith("https://")
        trusted = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(f"{where}/health", context=trusted) as answer:
            assert json.load(answer) == {"status": "ok"}
        with pytest.raises(OSError):
            call(where, "/health")  # without TLS
    for files in ((key, certificate), (certificate, str(tmp_path / "no.pem"))):
        with pytest.raises(ConfigError, match="tls_certificate"):
            check_tls(ServerConfig(tls_certificate=files[0], tls_key=files[1]))


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"max_pending": 0}, "max_pending"),
        ({"port": 70000}, "port"),
        ({"request_timeout": 0.0}, "request_timeout"),
        ({"step_timeout": 0.0}, "step_timeout"),
        ({"tls_key": "x"}, "tls_certificate and tls_key"),
        ({"api_key": ("",)}, "api_key"),
        ({"unknown_fields": "maybe"}, "unknown_fields"),
        ({"drain_timeout": -1.0}, "drain_timeout"),
    ],
)
def test_wrong_settings(settings, what):
    with pytest.raises(ConfigError, match=what):
        ServerConfig(**settings)


def test_a_port_that_is_taken(server):
    with pytest.raises(ConfigError, match="cannot listen at"):
        listen(ServerConfig(port=urlsplit(server).port))


def test_a_dead_engine_is_told_to_clients_and_on_health(folder):
    llm = AsyncLLM(folder, dtype="float32", max_num_seqs=2, max_model_len=128, warmup=False)
    launch, calls = llm.engine.runner.launch, []

    def breaks(*step):
        calls.append(step)
        if len(calls) > 5:
            raise MemoryError("the device is gone")
        return launch(*step)

    llm.engine.runner.launch = breaks
    with serving(llm) as (where, _):
        client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
        texts = []
        with pytest.raises(openai.APIError, match="device is gone"):
            for chunk in client.completions.create(model="tiny", prompt="x", stream=True, extra_body={"ignore_eos": True}):
                texts.append(chunk.choices[0].text)
        assert texts, "the stream had begun"
        with pytest.raises(openai.APIStatusError, match="device is gone") as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503
        status, _, body = call(where, "/health")
        assert status == 503 and "device is gone" in body["error"]["message"]
        assert call(where, "/ready")[0] == 503 and call(where, "/version")[0] == 200


def test_an_engine_that_hangs_is_told_on_health_for_as_long_as_it_does(folder, caplog):
    llm = AsyncLLM(folder, dtype="float32", max_num_seqs=2, max_model_len=128, warmup=False)
    launch, go_on = llm.engine.runner.launch, threading.Event()
    asyncio.run(anext(llm.generate("x", SamplingParams(max_tokens=2))))  # what compiles has been compiled
    llm.engine.runner.launch = lambda *step: go_on.wait(60) and launch(*step)
    with serving(llm, step_timeout=0.5) as (where, _):
        assert call(where, "/health")[0] == 200
        client = openai.AsyncOpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)

        async def run():
            asked = [asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=2)) for _ in range(2)]
            await asyncio.to_thread(until, lambda: call(where, "/health")[0] == 503)
            _, _, body = await asyncio.to_thread(call, where, "/ready")
            assert body["error"]["code"] == "engine_hangs" and "2 prompts wait" in body["error"]["message"]
            asked[0].cancel()  # that nobody waits any more does not make it well
            await asyncio.sleep(0.2)
            assert (await asyncio.to_thread(call, where, "/health"))[0] == 503
            go_on.set()
            assert (await asked[1]).usage.completion_tokens == 2

        asyncio.run(run())
        until(lambda: call(where, "/health")[0] == 200)
        settled(llm)
        assert llm.silent_for == 0
        until(lambda: any("hangs no more" in record.getMessage() for record in caplog.records))
    llm.shutdown()
    assert any("the engine hangs" in record.getMessage() for record in caplog.records)


def test_sigterm_lets_requests_finish_refuses_others_and_ends_what_is_too_slow(folder):
    """One process: a request that finishes while it drains, one that is refused, one that the deadline ends."""
    process, where, lines = start(folder, "--drain-timeout", "3")
    try:
        client = openai.AsyncOpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)

        async def run():
            asked = dict(model=str(folder), prompt="x", stream=True, temperature=0, extra_body={"ignore_eos": True})
            short = await client.completions.create(max_tokens=40, **asked)
            long = await client.completions.create(max_tokens=1900, **asked)
            iterator = aiter(short)
            await anext(iterator)
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(until, lambda: call(where, "/ready")[0] == 503)
            status, headers, _ = call(where, "/v1/completions", {"prompt": "x"})
            assert status == 503 and headers["Retry-After"]
            last = [chunk async for chunk in iterator][-1]
            assert last.choices[0].finish_reason == "length"
            try:
                ended = [chunk async for chunk in long][-1].choices[0].finish_reason == "length"  # a fast machine
            except openai.APIError as error:
                ended = "shut down" in str(error)
            assert ended

        asyncio.run(run())
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert any("SIGTERM: " in line for line in lines) and not any("Traceback" in line for line in lines)
