"""`jaxllm train --dry-run` expects the memory that the run takes, and trains nothing."""

import json

import jax
import pytest
from tiny_models import write_llama

from jaxllm.config import from_dict
from jaxllm.launch.__main__ import main
from jaxllm.planning import CHIPS
from jaxllm.planning import training as planning
from jaxllm.training import TrainConfig, Trainer


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    write_llama(folder / "model", tokenizer=True)
    (folder / "data.jsonl").write_text('{"prompt": "red ->", "completion": " yes"}\n' * 6)
    return folder, {"model": str(folder / "model"), "output_dir": str(folder / "run"), "batch_size": 2, "max_length": 16}


def dry(settings, capfd, *flags):
    folder, values = settings
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code = main(["train", "--data.path", str(folder / "data.jsonl"), *words, "--dry-run", "--json", *flags])
    out, error = capfd.readouterr()
    assert code == 0, error
    assert not (folder / "run").exists()
    return json.loads(out.splitlines()[-1]), error


def test_what_is_expected_is_what_the_trainer_takes(settings, capfd):
    folder, values = settings
    report, told = dry(settings, capfd, "--lora.r", "4")
    data = {"path": [str(folder / "data.jsonl")]}
    trainer = Trainer(from_dict(TrainConfig, values | {"data": data, "lora": {"r": 4}}))
    held, expected = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)), report["expected"]
    assert expected["per_device_bytes"]["parameters"] == held((trainer.state.params, trainer.frozen))
    assert expected["per_device_bytes"]["optimizer"] == held(trainer.state.opt_state)
    assert report["steps"] == trainer.total_steps
    assert expected["tokens"] == 32 and expected["fits"] and expected["step_s"] > 0
    assert report["total_s"] == report["steps"] * expected["step_s"]
    assert "memory of a device" in told and "measured here" in told


def test_what_does_not_fit_is_told_and_not_run(settings, capfd, monkeypatch):
    monkeypatch.setattr(planning, "_capacity", lambda devices: 1000)
    report, told = dry(settings, capfd)
    assert not report["expected"]["fits"] and report["expected"]["step_s"] is report["total_s"] is None
    assert "does NOT fit" in told and "time:" not in told


def test_on_chips_that_are_not_here(settings, capfd):
    pytest.importorskip("libtpu")
    report, told = dry(settings, capfd, "--topology", "v5e:1x1")
    step = report["expected"]["step"]
    assert report["total_s"] == report["steps"] * step["bound_s"] > 0
    assert report["expected"]["per_chip_bytes"]["capacity"] == CHIPS["v5e"].memory_bytes
    assert "the least that v5e:1x1 can take" in told


def test_topology_without_dry_run_is_refused(settings, capfd):
    folder, values = settings
    flags = ["--model", values["model"], "--output-dir", values["output_dir"], "--data.path", str(folder / "data.jsonl")]
    assert main(["train", *flags, "--topology", "v5e:1x1"]) == 2
    assert "--dry-run" in capfd.readouterr().err
