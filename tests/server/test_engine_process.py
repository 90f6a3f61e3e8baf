"""The engine in a process of its own: what kills it is told, it comes back, and it never outlives its server."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from urllib.parse import urlsplit
from urllib.request import urlopen

import openai
import psutil
import pytest
from servers import call, start, until

from jaxllm import AsyncLLM, SamplingParams
from jaxllm.errors import CheckpointError, ConfigError, RequestError
from jaxllm.serving import EngineDeadError, engine_process

TINY = dict(dtype="float32", max_num_seqs=2, max_model_len=600, max_num_batched_tokens=32, page_size=4)
LONG = dict(model="tiny", prompt="x", temperature=0, extra_body={"ignore_eos": True})


def engines_of(server: psutil.Process) -> list[psutil.Process]:
    return [child for child in server.children(recursive=True) if "jaxllm.serving.engine_child" in child.cmdline()]


@pytest.fixture
def served(folder):
    process, where, lines = start(folder, "--served-model-name", "tiny", "--step-timeout", "1")
    yield process, where, lines
    process.kill()
    process.wait()


def test_kill_9_of_the_engine_is_told_to_clients_and_repaired(served):
    process, where, lines = served
    client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
    wanted = client.completions.create(max_tokens=30, **LONG).choices[0].text
    (engine,) = engines_of(psutil.Process(process.pid))
    stream = iter(client.completions.create(max_tokens=1900, stream=True, **LONG))
    next(stream)
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="SIGKILL"):
        list(stream)
    status, _, body = call(where, "/health")
    assert status == 503 and "SIGKILL" in body["error"]["message"] and "started again" in body["error"]["message"]
    status, headers, body = call(where, "/v1/completions", {"prompt": "x"})
    assert status == 503 and body["error"]["code"] == "engine_dead" and headers["Retry-After"]
    until(lambda: call(where, "/ready")[0] == 200)
    assert client.completions.create(max_tokens=30, **LONG).choices[0].text == wanted
    metrics = urlopen(f"{where}/metrics").read().decode()
    assert 'jaxllm:engine_restarts_total{model_name="tiny"} 1.0' in metrics
    assert any("SIGKILL" in line for line in lines) and any("the engine runs again" in line for line in lines)
    (engine,) = engines_of(psutil.Process(process.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0 and not engine.is_running()
    assert not any("Traceback" in line for line in lines)


def test_the_engine_ends_with_its_server_however_that_ends(served):
    process, where, _ = served
    (engine,) = engines_of(psutil.Process(process.pid))
    engine.send_signal(signal.SIGTERM)  # a service manager signals the whole group: it is for the server to say when
    assert call(where, "/v1/completions", {"prompt": "x", "max_tokens": 3})[0] == 200
    process.kill()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_an_engine_that_is_stopped_is_told_on_health_and_goes_on(served):
    process, where, lines = served
    (engine,) = engines_of(psutil.Process(process.pid))
    client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
    wanted = client.completions.create(max_tokens=1000, **LONG).choices[0].text
    stream = iter(client.completions.create(max_tokens=1000, stream=True, **LONG))
    text = next(stream).choices[0].text
    engine.suspend()
    large = {"prompt": "x", "max_tokens": 1, "stop": [f"{i:01000}" for i in range(200)]}  # more than a pipe holds
    others = [threading.Thread(target=call, args=(where, "/v1/completions", large)) for _ in range(4)]
    for other in others:
        other.start()
    until(lambda: call(where, "/health")[0] == 503)
    assert call(where, "/ready")[2]["error"]["code"] == "engine_hangs" and call(where, "/version")[0] == 200
    until(lambda: any("the engine hangs:" in line for line in lines))
    engine.resume()
    assert text + "".join(chunk.choices[0].text for chunk in stream) == wanted
    for other in others:
        other.join()
    assert call(where, "/health")[0] == 200
    until(lambda: any("hangs no more" in line for line in lines))


def test_an_engine_that_does_not_come_back_is_given_up(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_process, "_TRIES", 2)
    model = tmp_path / "model"
    model.symlink_to(folder)
    llm = AsyncLLM(str(model), engine_process=True, warmup=False, **TINY)
    try:
        model.unlink()

        async def run():
            waiting = asyncio.create_task(anext(llm.generate("x", SamplingParams(max_tokens=500, ignore_eos=True))))
            await waiting
            psutil.Process(llm.backend.pid).kill()
            while "not started again" not in str(llm.dead):
                await asyncio.sleep(0.05)
            with pytest.raises(EngineDeadError, match="2 times in a row"):
                await anext(llm.generate("x"))

        asyncio.run(asyncio.wait_for(run(), 60))
        assert llm.restarts == 0
    finally:
        llm.shutdown()


def test_an_error_of_the_engine_itself_and_what_it_cannot_be_asked(folder):
    llm = AsyncLLM(folder, engine_process=True, warmup=False, **TINY)
    try:

        async def run():
            assert await llm.ask(_pages) == llm.figures.pages
            with pytest.raises(Exception, match="pickle|local object"):
                await llm.ask(lambda engine: 1)
            with pytest.raises(ConfigError, match="another process"):
                _ = llm.engine
            with pytest.raises(ConfigError, match="cannot import"):
                await asyncio.wrap_future(llm.backend._request("ask", b"cno_such_module\nname\n."))
            with pytest.raises(ConfigError, match="cannot leave"):
                await llm.ask(_itself)
            with pytest.raises(RequestError, match="nonsense"):
                await anext(llm.generate("x", SamplingParams(structured_outputs={"json": {"type": "nonsense"}})))
            stream = llm.generate("x", SamplingParams(max_tokens=500, ignore_eos=True))
            await anext(stream)
            broken = asyncio.create_task(llm.ask(_break))
            with pytest.raises(EngineDeadError, match="the device is gone"):
                [_ async for _ in stream]
            await asyncio.gather(broken, return_exceptions=True)
            deadline = time.monotonic() + 30
            while llm.dead is not None:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert (await anext(llm.generate("x", SamplingParams(max_tokens=2)))).outputs
            assert llm.restarts == 1

        asyncio.run(run())
    finally:
        llm.shutdown()
    assert llm.dead is not None


def _pages(engine):
    return engine.pool.capacity


def _itself(engine):
    return engine


def _break(engine):
    raise MemoryError("the device is gone")


def test_what_is_wrong_at_the_start_is_the_error_it_is_in_a_thread(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        AsyncLLM(str(tmp_path / "nowhere"), engine_process=True)
    with pytest.raises(ConfigError, match="max_model_len"):
        AsyncLLM(folder, engine_process=True, max_model_len=10**9)
    with pytest.raises(ConfigError, match="logits_processors"):
        AsyncLLM(folder, engine_process=True, logits_processors={"a": print})


def test_a_head_without_end_is_refused(server):
    url = urlsplit(server)
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):  # it was closed while more was sent
            connection.sendall(b"a" * (1 << 20))
            assert b" 400 " in connection.recv(1000)  # times out where there is no end to a head
    assert call(server, "/health")[0] == 200
