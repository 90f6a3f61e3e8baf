"""`jaxllm generate` and `jaxllm chat` with a tiny random model, and once with the demo model against Hugging Face's tokens."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxllm.checkpoints import open_checkpoint, write_safetensors
from jaxllm.launch.__main__ import main
from jaxllm.paths import cache_dir
from jaxllm.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
FLAGS = ["--max-model-len", "128", "--max-tokens", "12", "--no-warmup"]  # only what is needed is compiled: it takes seconds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A Hugging Face folder: the golden llama with as many random embeddings as the golden tokenizer has tokens."""
    source, folder = open_checkpoint(GOLDENS / "models" / "llama_gqa"), tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = load_tokenizer(GOLDENS / "tokenizers" / "byte_bpe").vocab_size
    width = source.config["hidden_size"]
    random = np.random.default_rng(0)

    def tensors():
        for name, info in source.tensors.items():
            wide = info.shape == (source.config["vocab_size"], width)
            yield name, random.standard_normal((vocabulary, width)).astype(np.float32) if wide else source.read(name)

    config = {**source.config, "vocab_size": vocabulary, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None}
    write_safetensors(folder, tensors(), config)
    for file in (GOLDENS / "tokenizers" / "byte_bpe").iterdir():
        shutil.copy(file, folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": TEMPLATE}))
    return str(folder)


def run(capfd, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of a command that must succeed."""
    code = main(list(arguments))
    out, err = capfd.readouterr()
    assert code == 0, err
    return out, err


def test_one_prompt(tiny, capfd, tmp_path):
    result = json.loads(run(capfd, "generate", "--model", tiny, "--prompt", "The cat", *FLAGS, "--json")[0])
    assert list(result) == ["text", "token_ids", "finish_reason", "usage", "timings", "model"]
    assert result["finish_reason"] == "length" and len(result["token_ids"]) == 12 and result["model"] == tiny
    tokenizer = load_tokenizer(tiny)
    prompt_tokens = len(tokenizer.encode("The cat"))
    assert result["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": 12, "total_tokens": prompt_tokens + 12}
    assert list(result["timings"]) == ["load_s", "compile_s", "ttft_s", "decode_tokens_per_s", "total_s"]
    assert all(value > 0 for value in result["timings"].values())

    # The live stream shows the prompt and the same text; numbers go to stderr.
    out, err = run(capfd, "generate", "--model", tiny, "--prompt", "The cat", *FLAGS)
    assert out == f"The cat{result['text']}\n"
    assert "12 tokens; " in err and "tokens/s" in err

    (tmp_path / "prompt.txt").write_text("The cat\n")
    out, _ = run(capfd, "generate", "--model", tiny, "--prompt-file", str(tmp_path / "prompt.txt"), "--no-stream", *FLAGS)
    assert out == result["text"] + "\n"


def test_several_prompts_are_a_batch_of_the_same_answers(tiny, capfd):
    flags = ["generate", "--model", tiny, *FLAGS, "--json"]
    alone = json.loads(run(capfd, *flags, "--prompt", "The cat")[0])
    result = json.loads(run(capfd, *flags, "--prompt", "A longer one, of more tokens", "--prompt", "The cat")[0])
    assert list(result) == ["model", "outputs"] and len(result["outputs"]) == 2
    assert result["outputs"][1]["token_ids"] == alone["token_ids"] != result["outputs"][0]["token_ids"]
    assert set(result["outputs"][0]) == set(alone)


def test_chat_template(tiny, capfd):
    arguments = ["generate", "--model", tiny, "--chat", "--system", "Be kind", "--prompt", "Hi", *FLAGS, "--json"]
    result = json.loads(run(capfd, *arguments)[0])
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    assert result["usage"]["prompt_tokens"] == len(load_tokenizer(tiny).apply_chat_template(messages))


BAD_VALUES = [
    (["--max-tokens", "0"], "max_tokens must be"),
    (["--temperature", "-1"], "temperature must be"),
    (["--temperature", "nan"], "temperature must be"),
    (["--top-p", "0"], "top_p must be"),
    (["--top-k", "-5"], "top_k must be"),
    (["--seed", "-1"], "seed must be"),
    (["--stop", ""], "stop must be"),
    (["--max-model-len", "0"], "max_model_len must be"),
    (["--tensor-parallel-size", "0"], "tensor_parallel_size must be"),
]


@pytest.mark.parametrize("flags, message", BAD_VALUES, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_bad_values_are_wrong_flags(capfd, flags, message):
    assert main(["generate", "--model", "demo", "--prompt", "a", *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_refused_request_is_one_json_error(tiny, capfd):
    assert main(["generate", "--model", tiny, "--prompt", "word " * 300, *FLAGS, "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "RequestError" and "Traceback" not in err


def test_a_missing_model_is_one_json_error(capfd):
    assert main(["generate", "--model", "no/such/folder/here", "--prompt", "a", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "CheckpointError" and "Traceback" not in err


def test_chat_from_a_pipe(tiny, capfd, monkeypatch):
    lines = ["Hi", "/system Be brief", "One", "/reset", "/nonsense", "/help", "", "Two", "word " * 300, "Three", "/exit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, err = run(capfd, "chat", "--model", tiny, *FLAGS, "--json")
    said = json.loads(out)["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in said[::2]][0] == "Be brief" and [said[1]["content"], said[3]["content"]] == ["Two", "Three"]
    assert said[2]["content"] and said[2]["content"] in err
    for message in ("unknown command /nonsense", "/system TEXT", "(conversation forgotten)", "error: ", "/reset forgets"):
        assert message in err


def test_interrupting_an_answer_keeps_the_chat(tiny):
    """Ctrl-C stops the answer, the next line is answered, and the end of stdin leaves with exit code 0."""
    command = [
        sys.executable,
        "-m",
        "jaxllm.launch",
        "chat",
        "--model",
        tiny,
        "--max-tokens",
        "1900",
        "--max-model-len",
        "2048",
        "--no-warmup",
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, cwd=ROOT, **pipes) as process:
        try:
            process.stdin.write(b"Hi\n")
            process.stdin.flush()
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            process.stdin.write(b"/reset\n")
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, err.decode()
    assert b"(stopped)" in err and b"(conversation forgotten)" in err and b"Traceback" not in err


@pytest.mark.slow  # it compiles for half a minute the first time
@pytest.mark.skipif(not any(cache_dir().rglob("*.gguf")), reason="the demo model is not here; `make demo` fetches it")
def test_demo_says_what_hugging_face_says(capfd):
    golden = json.loads((GOLDENS / "demo.json").read_text(encoding="utf-8"))["prompts"][0]
    arguments = ["generate", "--model", "demo", "--prompt", golden["text"], "--max-tokens", "48", "--max-model-len", "256", "--json"]
    result = json.loads(run(capfd, *arguments)[0])
    assert result["finish_reason"] == "stop"
    assert result["token_ids"] == golden["greedy"][: len(result["token_ids"])] and result["token_ids"][-1] == 2
