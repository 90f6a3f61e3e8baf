"""The command line as a user and as a program meet it: a real process for each promise."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxllm.config import parse
from jaxllm.launch import chat, doctor, generate, plan
from jaxllm.launch.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def jaxllm(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxllm.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)


def test_overview_names_every_command_and_imports_no_jax():
    heavy = "[name for name in ('jax', 'flax', 'numpy', 'yaml') if name in sys.modules]"
    script = f"import sys; from jaxllm.launch.__main__ import main; main(['--help']); print({heavy})"
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert lines[-1] == "[]"
    assert all(any(line.strip().startswith(name) for line in lines) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_flag_and_imports_no_jax(name):
    script = f"import sys; from jaxllm.launch.__main__ import main; main(['{name}', '--help']); print('jax' in sys.modules)"
    page = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert f"usage: jaxllm {name}" in page and "--json" in page and page.endswith("False\n")
    flags = [line for line in page.splitlines() if line.startswith("  --")]
    following = dict(zip(page.splitlines(), page.splitlines()[1:], strict=False))
    undocumented = [line for line in flags if len(line) < 34 and not following[line].startswith(" " * 30)]
    assert not undocumented


def test_parsing_takes_a_third_of_a_second_at_most():
    """CPU seconds of a whole process, interpreter included, at the best of three: other work on the machine is not ours."""
    script = (
        "import time; from jaxllm.launch.__main__ import main;"
        "main(['generate', '--model', 'm', '--max-tokens', '9']); print(time.process_time())"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.3


BAD = [
    (["genrate"], 2, "ConfigError", "unknown command `genrate`; did you mean `generate`? See jaxllm --help"),
    (["xyzzy"], 2, "ConfigError", "unknown command `xyzzy`; known: generate, chat,"),
    (["--verbose"], 2, "ConfigError", "`--verbose` stands where a command should"),
    (["generate"], 2, "ConfigError", "missing `model`: give --model"),
    (["generate", "--model", "m"], 2, "ConfigError", "give either --prompt (once or more) or --prompt-file"),
    (["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"], 2, "ConfigError", "give either --prompt"),
    (["generate", "--model", "m", "--prompt-file", "nowhere.txt"], 2, "ConfigError", "prompt_file: cannot read nowhere.txt"),
    (["generate", "--model", "m", "--promt", "a"], 2, "ConfigError", "unknown key `promt`; did you mean `prompt`?"),
    (["generate", "--model", "m", "--prompt", "a", "--dtype", "int3"], 2, "ConfigError", "`--dtype`: expected auto|float32|bfloat16"),
    (["generate", "--model", "m", "--prompt", "a", "--system", "s"], 2, "ConfigError", "system needs --chat"),
    (["generate", "--model", "m", "--prompt", "a", "--prompt", "b", "--stream"], 2, "ConfigError", "stream is for one prompt"),
    (["chat", "--model", "m", "--prompt", "a"], 2, "ConfigError", "unknown key `prompt`"),
    (["convert", "--model", "m"], 2, "ConfigError", "missing `out`: give --out"),
    (["doctor", "--config", "nowhere.yaml"], 2, "ConfigError", "nowhere.yaml: cannot read this configuration file"),
]


@pytest.mark.parametrize("arguments, code, kind, message", BAD)
def test_mistakes_are_one_line_and_one_json_object(capfd, arguments, code, kind, message):
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert main([*arguments, "--json"]) == code
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == kind and error["message"].startswith(message) and out.count("\n") == 1


def test_traceback_on_request():
    quiet, loud = (jaxllm("generate", "--model", "m", env={**os.environ, "JAXLLM_TRACEBACK": value}) for value in "01")
    assert quiet.returncode == loud.returncode == 2
    assert "Traceback" not in quiet.stderr and "Traceback" in loud.stderr


def test_json_goes_last_and_alone(tmp_path, capfd, monkeypatch):
    """Whatever a command, its libraries and its child processes print, stdout holds one JSON object."""
    (tmp_path / "noisy.py").write_text(
        "import os, subprocess\nfrom dataclasses import dataclass\nfrom jaxllm.launch.command import Command\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Config(Command):\n    'Noise.'\n"
        "def run(config):\n    print('python')\n    os.write(1, b'C\\n')\n    subprocess.run(['echo', 'child'])\n"
        "    return {'text': 'caf\\u00e9'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "noisy", ("noisy", "Noise."))
    assert main(["noisy", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"text": "café"} and out.count("\n") == 1
    assert {"python", "C", "child"} <= set(err.split())
    assert main(["noisy"]) == 0
    assert set(capfd.readouterr().out.split()) == {"python", "C", "child"}


def test_unforeseen_errors_keep_their_traceback(tmp_path, capfd, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "from jaxllm.launch.command import Command as Config\ndef run(config):\n    raise ZeroDivisionError('a bug')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "broken", ("broken", "A bug."))
    assert main(["broken", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out) == {"error": {"type": "ZeroDivisionError", "message": "a bug"}} and "Traceback" in err


def test_interrupt_is_130(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import sys, time\nfrom jaxllm.launch.command import Command as Config\n"
        "def run(config):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    script = "import sys; from jaxllm.launch.__main__ import COMMANDS, main; COMMANDS['slow'] = ('slow', ''); sys.exit(main(['slow']))"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-m", "jaxllm.launch", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    os.close(writer)
    assert process.returncode == 1 and process.stderr == ""


def test_json_is_no_key_of_a_file(tmp_path, capfd):
    (tmp_path / "run.yaml").write_text("json: true")
    assert main(["doctor", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "json is a plain flag" in capfd.readouterr().err


def test_doctor(tmp_path):
    secrets = {"HF_TOKEN": "hf_verysecret", "HF_ENDPOINT": "https://me:verysecret@example.com", "JAXLLM_API_KEY": "verysecret"}
    env = {**os.environ, **secrets, "JAXLLM_CACHE": str(tmp_path)}
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    done = jaxllm("doctor", "--json", env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["jax"] and report["versions"]["flax"] and report["versions"]["python"].startswith("3.")
    assert len(report["devices"]) == 8 and report["devices"][0]["platform"] == "cpu"  # the eight of tests/conftest.py
    assert report["matmul"]["float32"]["ok"] and report["matmul"]["bfloat16"]["ok"]
    assert report["caches"]["jaxllm"] == {"path": str(tmp_path), "bytes": 1000}
    assert report["environment"]["HF_TOKEN"] == "(set, hidden)"
    assert "verysecret" not in done.stdout + done.stderr


def test_doctor_prints_the_same_for_people_and_survives_a_missing_driver():
    done = jaxllm("doctor", env={**os.environ, "JAX_PLATFORMS": "cuda", "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert "JAX cannot use its device" in done.stdout and "jaxlib" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "JAXLLM_API_KEY", "HF_SECRET", "JAX_KEY"])
def test_secret_names_are_hidden(name):
    assert "s3cret" not in str(doctor.environment({name: "s3cret", "XLA_FLAGS": "--a"}))
    assert doctor.environment({"XLA_FLAGS": "--a", "PATH": "/bin"}) == {"XLA_FLAGS": "--a"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "serve").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_read(path):
    parse(chat.Config, ["--config", str(path)], prog="jaxllm chat")
    parse(generate.Config, ["--config", str(path), "--prompt", "x"], prog="jaxllm generate")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_configurations_are_read(path):
    """Their sizes are those of their names."""
    c = plan.read_model_config(str(path))
    layer = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.hidden_size * c.intermediate_size
    parameters = c.num_layers * layer + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    assert parameters == pytest.approx(float(path.stem.split("-")[-1].rstrip("b")) * 1e9, rel=0.06)


def _written_commands() -> list[tuple[str, str]]:
    """Every `jaxllm COMMAND --flags` in the launch files and recipes, as (file, command line)."""
    found = []
    for path in sorted([*(ROOT / "launch").iterdir(), *(ROOT / "configs").rglob("*")]):
        for line in path.read_text().splitlines() if path.is_file() else []:
            _, there, rest = line.partition("jaxllm ")
            if there and rest.split(" ")[0] in COMMANDS and "$" not in rest and "COMMAND" not in rest:
                found.append((path.name, rest.rstrip("'").partition("   #")[0]))
    return found


@pytest.mark.parametrize("file, line", _written_commands())
def test_commands_in_launch_files_and_recipes_parse(file, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *flags = shlex.split(line)
    module = importlib.import_module(COMMANDS[name][0])
    assert parse(module.Config, flags, prog=file).json in (True, False)


def test_launch_yaml_and_shell_are_well_formed():
    for path in (ROOT / "launch").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
    for path in [ROOT / "launch" / "tpu_vm.sh", ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run", ROOT / ".ci" / "find-python"]:
        assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
        assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


def test_gke_job_arguments_parse():
    job = yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())
    name, *flags = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert name == "generate" and parse(generate.Config, flags, prog="gke").max_tokens == 48
