"""Several processes train as one does: the same losses, one checkpoint, one set of files; stopped together and gone on from there."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import write_llama

from jaxllm.checkpoints.safetensors_source import read_file
from jaxllm.config import from_dict, to_dict
from jaxllm.errors import ConfigError
from jaxllm.launch.train import Config
from jaxllm.training import TrainConfig, Trainer
from jaxllm.training.data import DataConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[2]


def start(settings, count: int) -> list[subprocess.Popen]:
    """`jaxllm train` as `count` processes of one device each."""
    file = Path(settings.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(settings)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "jaxllm.launch", "train", "--config", str(file), "--json", "--coordinator-address", address]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    numbers = lambda i: ["--num-processes", str(count), "--process-id", str(i)]
    return [subprocess.Popen([*command, *numbers(i)], env=environment, **pipes) for i in range(count)]


def results(processes: list[subprocess.Popen]) -> list[dict]:
    told = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(error[-3000:] for _, error in told)
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line}


@pytest.mark.parametrize("flags", [{"num_processes": 2}, {"coordinator_address": "a:1", "num_processes": 2}])
def test_half_an_address_is_refused(flags):
    with pytest.raises(ConfigError, match="coordinator_address, num_processes and process_id go together"):
        Config(model="demo", output_dir="unused", data=DataConfig(path=("unused",)), **flags)


LORA = {"mesh": {"data": 2}, "lora": {"r": 4, "target_modules": "all-linear"}}


@pytest.mark.parametrize("changes", [{"mesh": {"fsdp": 2}}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_two_processes_are_one(changes, tmp_path):
    model = write_llama(tmp_path / "model", tokenizer=True, max_position_embeddings=64)
    records = [{"prompt": f"{'red ' * (i % 7)}->", "completion": " yes yes"} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {"model": str(model), "data": {"path": [str(tmp_path / "train.jsonl")]}, "optimizer": {"learning_rate": 1e-3}}
    tree |= {"batch_size": 4, "max_length": 32, "max_steps": 200, "logging_steps": 1, "save_steps": 50, "export_dtype": "float32"}
    tree |= {"eval_data": tree["data"]}
    Trainer(from_dict(TrainConfig, tree | changes | {"mesh": {}, "output_dir": str(tmp_path / "one")})).train()

    settings = from_dict(TrainConfig, tree | changes | {"output_dir": str(tmp_path / "two")})
    processes = start(settings, 2)
    while all(process.poll() is None for process in processes) and not (tmp_path / "two" / "config.yaml").exists():
        time.sleep(0.01)
    processes[1].terminate()  # one is asked, and both stop
    stopped = results(processes)
    assert all(told["stopped"] == "SIGTERM" and told["steps"] == stopped[0]["steps"] < 200 for told in stopped)
    ended = results(start(settings, 2))
    assert [told["steps"] for told in ended] == [200, 200] and ended[0]["eval_loss"] == ended[1]["eval_loss"]

    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and list(two.values()) == pytest.approx(list(one.values()), rel=1e-5, abs=1e-6)
    name = "adapter" if "lora" in changes else "model"
    kinds = {"adapter": "adapter_model.safetensors", "model": "model.safetensors"}
    ours, theirs = (read_file(tmp_path / run / name / kinds[name]) for run in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        np.testing.assert_allclose(ours[tensor], theirs[tensor], atol=1e-5, err_msg=tensor)
