"""Plans for TPUs that are not here, made by the TPU's own compiler; they also guard what our programs cost there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.launch.plan import read_model_config
from jaxllm.planning import find_topology

REPOSITORY = Path(__file__).parents[2]
MODELS = REPOSITORY / "configs" / "models"


def plan(*flags):
    """In a process of its own, as users do: the TPU compiler is to find a machine without virtual devices."""
    command = [sys.executable, "-m", "jaxllm.launch", "plan", *map(str, flags), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology,tensor", [("v6e:2x2", 4), ("v5e:2x4", 8)])
def test_llama_3_8b_is_close_to_the_least_that_it_can_cost(topology, tensor):
    pytest.importorskip("libtpu")
    result = plan("--model", MODELS / "llama-3-8b.yaml", "--topology", topology, "--max-num-seqs", 64, "--max-model-len", 2048)
    assert result["fits"] and result["max_sequences"] >= 64
    held, decode = result["per_chip_bytes"], result["decode"]
    assert held["parameters"] == pytest.approx(8.03e9 * 2 / tensor, rel=0.01)
    assert held["kv_cache"] == pytest.approx(64 * 2048 * 32 * 2 * 8 * 128 * 2 / tensor, rel=0.01)
    assert decode["temporaries"] <= 0.02 * (held["parameters"] + held["kv_cache"])  # no second copy of the cache
    assert 1.0 <= decode["bytes_moved"] / decode["bytes_minimum"] <= 1.10
    assert 0.5 < decode["compiler_s"] / decode["bound_s"] < 10  # the same order: a wrong clock or a loop counted once is not
    in_layers = sum(c["count"] for c in decode["collectives"] if c["kind"] == "all-reduce")
    assert in_layers <= 2 * 32 + 2


def test_what_does_not_fit_is_said_with_the_remedy():
    pytest.importorskip("libtpu")
    result = plan("--model", MODELS / "llama-3-8b.yaml", "--topology", "v5e:1x1", "--max-num-seqs", 8)
    assert not result["fits"] and f"lower max_num_seqs to {result['max_sequences']}" in result["remedy"]
    result = plan("--model", MODELS / "qwen3-14b.yaml", "--topology", "v5e:1x1", "--max-num-seqs", 8)
    assert not result["fits"] and "tensor=2 on a topology with as many chips" in result["remedy"]


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
