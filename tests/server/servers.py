"""What the server's tests share: real servers on loopback, in a thread."""

import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from jaxllm.server.config import ServerConfig
from jaxllm.server.run import address, listen, make_server
from jaxllm.serving.news import figures_of

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + ' Call: <tool_call>...</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{{ (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<' + 'think>' if think else '') }}{% endif %}"
)


@contextlib.contextmanager
def serving(llm, **settings):
    """A server of `llm` in a thread; yields the address, and the Server."""
    config = ServerConfig(**{"port": 0, "served_model_name": ("tiny",)} | settings)
    listener, server = listen(config), make_server(llm, config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    try:
        yield address(config, listener), server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def settled(llm):
    """Until the engine has nothing to do; and then nothing is left of what it did."""
    while (now := asyncio.run(llm.ask(figures_of))).requests or llm._pending:
        threading.Event().wait(0.01)
    assert now.free_pages == now.pages and not llm._streams


def call(where, path, body=None, headers=None, method=None):
    """Status, headers and JSON of one request."""
    connection = http.client.HTTPConnection(urlsplit(where).netloc, timeout=60)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, raw, headers or {})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(text) if text else None


def start(folder, *flags):
    """`serve` in a process of its own: the process, its address, and the lines that it logs."""
    command = [sys.executable, "-m", "jaxllm.launch", "serve", "--model", str(folder), "--port", "0", *flags]
    command += ["--max-model-len", "2000", "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--dtype", "float32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env={**os.environ})
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready after"):
            threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
            return process, line.split()[-1].removesuffix("/v1"), lines
    raise AssertionError("".join(lines))


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass within 30 s")
