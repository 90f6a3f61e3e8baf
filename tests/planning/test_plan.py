"""Plans for TPUs that are not here, made by the TPU's own compiler; `test_guards.py` looks at what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.launch.plan import read_model_config
from jaxllm.planning import CHIPS, find_topology
from jaxllm.serving import loading

REPOSITORY = Path(__file__).parents[2]
MODELS = REPOSITORY / "configs" / "models"


def plan(*flags):
    """In a process of its own, as users do: the TPU compiler is to find a machine without virtual devices."""
    command = [sys.executable, "-m", "jaxllm.launch", "plan", *map(str, flags), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_does_not_fit_is_said_with_the_remedy(tmp_path):
    pytest.importorskip("libtpu")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.svg"
    result = plan("--model", MODELS / "llama-3-8b.yaml", "--topology", "v5e:1x1", "--max-num-seqs", 8, "--plot", picture)
    assert picture.read_text().endswith("</svg>\n")
    assert not result["fits"] and f"lower max_num_seqs to {result['max_sequences']}" in result["remedy"]
    result = plan("--model", MODELS / "qwen3-14b.yaml", "--topology", "v5e:1x1", "--max-num-seqs", 8)
    assert not result["fits"] and "tensor=2 on a topology with as many chips" in result["remedy"]


@pytest.mark.slow
def test_llama_3_70b_fits_sixteen_small_chips():
    """It has fewer key/value heads than there are chips: their projections are split all the same."""
    pytest.importorskip("libtpu")
    result = plan("--model", MODELS / "llama-3-70b.yaml", "--topology", "v5e:4x4", "--max-num-seqs", 32, "--max-model-len", 4096)
    assert result["fits"] and result["max_sequences"] >= 32
    assert result["per_chip_bytes"]["parameters"] == pytest.approx(70.55e9 * 2 / 16, rel=0.01)
    assert result["decode"]["bytes_moved"] / result["decode"]["bytes_minimum"] <= 1.10


@pytest.mark.slow
def test_v7x_copies_no_weights_and_its_sums_are_seen():
    """Its weights stay in the tiles in which they come, and its sparse cores add over chips."""
    pytest.importorskip("libtpu")
    sizes = ("--max-num-seqs", 16, "--max-model-len", 1024, "--max-num-batched-tokens", 64)
    result = plan("--model", MODELS / "qwen3-0.6b.yaml", "--topology", "v7x:2x2x1", *sizes)
    decode = result["decode"]
    assert result["settings"]["tensor"] == 8  # four chips of two
    assert decode["bytes_moved"] / decode["bytes_minimum"] <= 1.10
    assert decode["temporaries"] <= 0.05 * result["per_chip_bytes"]["parameters"]
    assert [c["count"] for c in decode["collectives"] if c["kind"] == "all-reduce"] == [2 * 28 + 1]


def test_what_libtpu_must_be_told(monkeypatch):
    flag = CHIPS["v7x"].libtpu_flags[0]
    for said, missing in ((None, flag), ("--xla_other=1", flag), (f"--xla_other=1 {flag}", ""), (flag.replace("false", "true"), "")):
        monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
        if said is not None:
            monkeypatch.setenv("LIBTPU_INIT_ARGS", said)
        assert CHIPS["v7x"].missing_flags() == missing and CHIPS["v6e"].missing_flags() == ""


def test_an_engine_on_v7x_says_what_it_misses(monkeypatch, caplog):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    loading._check_libtpu("TPU v6 lite")
    assert not caplog.text
    loading._check_libtpu("TPU7x")
    assert f"LIBTPU_INIT_ARGS='{CHIPS['v7x'].missing_flags()}'" in caplog.text


@pytest.mark.parametrize(
    "name,message",
    [("v9:2x2", "no chip 'v9'"), ("v6:2x2", "did you mean v6e"), ("v6e", "shape of 2 numbers"), ("v5p:2x2", "shape of 3 numbers"),
     ("h100:2x2", "shape of one number, like h100:2"), ("h100:9", "a host has 1 to 8 GPUs"), ("h10:1", "did you mean h100")],
)  # fmt: skip
def test_unknown_topologies(name, message):
    with pytest.raises(ConfigError, match=message):
        find_topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu: pip install 'jaxllm\[plan\]'"):
        find_topology("v6e:2x2")
    with pytest.raises(ConfigError, match=r"needs jax's CUDA plugin.*pip install 'jaxllm\[cuda\]'"):
        find_topology("h100:2")


def test_bad_models(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.yaml").write_text("model_type: mamba")
    (tmp_path / "list.json").write_text("[1, 2]")
    for name, error, message in (
        ("list.yaml", ConfigError, "list.yaml"),
        ("broken.yaml", ConfigError, "not valid YAML"),
        ("broken.json", CheckpointError, "cannot be read"),
        ("list.json", CheckpointError, "must hold the entries"),
        ("other.yaml", CheckpointError, "'mamba' is not implemented"),
        ("none.yaml", CheckpointError, "There is no model"),
    ):
        with pytest.raises(error, match=message):
            read_model_config(str(tmp_path / name))


@pytest.mark.parametrize(
    "name,file", [("llama-3-8b", "llama-3-8b.yaml"), ("meta-llama/Llama-3-70B", "llama-3-70b.yaml"), ("lama3-8b.yaml", "llama-3-8b.yaml")]
)
def test_a_model_that_is_not_here_but_has_a_configuration(name, file, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"did you mean .*{Path('configs', 'models', file)}"):
        read_model_config(name)
