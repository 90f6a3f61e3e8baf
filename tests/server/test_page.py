"""The page, in a browser where there is one (`npm install playwright-core`, its node_modules in NODE_PATH, and Chromium)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from servers import settled

DRIVER = Path(__file__).with_name("drive_page.cjs")


def test_the_page_is_one_file_that_names_no_other_host(server):
    answer = urlopen(server)
    text = answer.read().decode()
    assert answer.headers["Content-Type"].startswith("text/html") and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(r"""https?://(?!\$)|src=|@import|url\(""", text)
    assert "innerHTML" not in text, "what a model writes is text, never markup"


def test_what_the_engine_does_now(server, llm):
    now = json.loads(urlopen(f"{server}/engine").read())
    assert now["model"] == "tiny" and now["running"] == [] and now["pages_used"] == 0 and now["pages"] == llm.figures.pages + 1


@pytest.fixture
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    found = (
        chromium
        and shutil.which("node")
        and subprocess.run(["node", "-e", "require('playwright-core')"], capture_output=True).returncode == 0
    )
    if not found:
        pytest.skip("no Chromium, or no playwright-core for node (NODE_PATH)")
    return chromium


def test_the_page_in_a_browser(server, browser, llm, tmp_path, monkeypatch):
    # On a busy machine the tiny model would have drawn its 1,800 tokens before the browser looks at what runs.
    counted = llm.on_step
    monkeypatch.setattr(llm, "on_step", lambda tokens: (time.sleep(0.02), counted(tokens)))
    command = ["node", str(DRIVER), server, browser, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["errors"] == [] and seen["hosts"] == [urlsplit(server).netloc] and seen["unnamed"] == []
    assert seen["model"] == "tiny" and len(seen["answer"]) > len("Model") and re.search(r"\d+ tokens", seen["status"])
    assert re.search(r"\d%\n   .*\d%", seen["title"]), "the drawn token, and the likeliest in its place"
    first, second = seen["bodies"]
    assert first["messages"] == [{"role": "user", "content": "Why?"}] and first["top_logprobs"] == 5
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    settings = {name: second[name] for name in ("temperature", "seed", "stop", "max_completion_tokens")}
    assert settings == {"temperature": 0, "seed": 7, "stop": ["zzzz", "yyyy"], "max_completion_tokens": 1800}
    assert seen["live"]["running"] == 1 and not seen["live"]["pages"].startswith("0 ")
    assert seen["dark"] and seen["fits"]
    settled(llm)
    for name, run in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):  # what it exports is what it sends
        script = re.sub(r'"?max_completion_tokens"?(: |=)1800', lambda m: m[0].replace("1800", "3"), seen[name])
        answer = subprocess.run([*run, script], capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0 and (name == "python" or "[DONE]" in answer.stdout), answer.stderr + answer.stdout
