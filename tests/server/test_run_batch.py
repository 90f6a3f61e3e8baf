"""OpenAI's batch files, and runs of them that are cut short."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from jaxllm import AsyncLLM
from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.server.batch import run_batch
from jaxllm.server.config import ServerConfig
from jaxllm.server.service import Service
from jaxllm.serving import EngineDeadError


def line(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


CHAT = [{"role": "user", "content": "Rain?"}]
GOOD = [
    line("chat", "/v1/chat/completions", model="tiny", messages=CHAT, max_tokens=4, temperature=0),
    line("text", "/v1/completions", prompt=["Once", "Twice"], max_tokens=4, temperature=0),
    line("vector", "/v1/embeddings", input="Once upon a time"),
    line("answer", "/v1/responses", input="Rain?", max_output_tokens=4, temperature=0),
]
BAD = {
    "stream": line("stream", "/v1/completions", prompt="a", stream=True),
    "url": line("url", "/v1/images", prompt="a"),
    "temprature": line("field", "/v1/completions", prompt="a", temprature=1),
    "model": line("model", "/v1/completions", prompt="a", model="other"),
    "custom_id": line("chat", "/v1/completions", prompt="a"),
    "store": line("store", "/v1/responses", input="a", store=True),
}


def write(path, lines):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))


def read(path):
    return {answer["id"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def run(llm, source, output):
    service = Service(llm, ServerConfig(served_model_name=("tiny",)))
    return asyncio.run(run_batch(service, source, output, at_once=8))


def test_every_url_and_every_error(llm, client, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [*GOOD, *BAD.values(), "{", ""])
    counts = run(llm, source, output)
    assert (counts.completed, counts.failed, counts.resumed) == (11, 7, 0)
    answers = read(output)
    chat, text, vector, answer = (answers[f"batch_req_{i}"]["response"]["body"] for i in range(4))
    over_http = client.chat.completions.create(**GOOD[0]["body"])
    assert chat["choices"][0]["message"]["content"] == over_http.choices[0].message.content
    assert len(text["choices"]) == 2 and len(vector["data"][0]["embedding"]) == 32
    assert answer["status"] == "incomplete" and answer["output"][0]["content"][0]["text"] == over_http.choices[0].message.content
    for i, param in enumerate(BAD, len(GOOD)):
        got = answers[f"batch_req_{i}"]
        assert got["response"]["status_code"] in (400, 404) and got["response"]["body"]["error"]["param"] == param
        assert got["custom_id"] == BAD[param]["custom_id"]
    assert "JSON" in answers["batch_req_10"]["response"]["body"]["error"]["message"] and answers["batch_req_10"]["custom_id"] is None
    before = output.read_bytes()
    assert run(llm, source, output).resumed == 11 and output.read_bytes() == before  # there is nothing left to do
    kept = before.splitlines(keepends=True)
    output.write_bytes(b"".join(kept[:5]) + kept[5][:20])  # as if it had been killed while it wrote
    counts = run(llm, source, output)
    assert (counts.resumed, counts.completed) == (5, 6) and set(read(output)) == set(answers)


def test_files_that_do_not_belong_together(llm, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, GOOD[1:2])
    run(llm, source, output)
    for lines, said in (([GOOD[0]], "another input"), ([], "does not have")):
        write(source, lines)
        with pytest.raises(ConfigError, match=said):
            run(llm, source, output)
    output.write_text("hello\n")
    with pytest.raises(ConfigError, match="did not write"):
        run(llm, source, output)


def test_lines_that_an_engine_leaves_are_for_the_next_run(folder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, GOOD[:2])
    gone = AsyncLLM(folder, dtype="float32", max_num_seqs=2, max_model_len=128, warmup=False)
    gone.shutdown()
    with pytest.raises(EngineDeadError):  # by itself, not in a group
        run(gone, source, output)
    assert output.read_bytes() == b""


def test_killed_and_started_again(folder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [line(f"r{i}", "/v1/completions", prompt=f"Story {i}", max_tokens=40, ignore_eos=True, seed=i) for i in range(60)])
    sizes = ["--max-num-seqs", "2", "--max-model-len", "128", "--max-num-batched-tokens", "32", "--dtype", "float32"]
    flags = ["run-batch", "-i", str(source), "-o", str(output), "--model", str(folder), *sizes]
    process = subprocess.Popen([sys.executable, "-m", "jaxllm.launch", *flags], stderr=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = output.read_bytes().count(b"\n")
    assert 3 <= there < 60
    assert main(flags) == 0
    ids = [json.loads(answer)["custom_id"] for answer in output.read_text().splitlines()]
    assert sorted(ids) == sorted(f"r{i}" for i in range(60))
