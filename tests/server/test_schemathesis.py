"""Requests drawn from our OpenAPI document, good and bad: none may bring about an error of the server's, or be left without an answer."""

import subprocess
import sys

import pytest
from servers import settled


@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("examples,coverage,fuzzing", marks=pytest.mark.slow)])
def test_no_request_of_the_document_breaks_the_server(server, llm, phases, tmp_path):
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", f"{server}/openapi.json"]
    limits = ["--checks", "not_a_server_error", "--max-examples", "5", "--request-timeout", "60", "--seed", "1", "--phases", phases]
    done = subprocess.run([*command, *limits, "--generation-database", "none"], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Operations:       20 selected / 20 total" in done.stdout, done.stdout
    settled(llm)
