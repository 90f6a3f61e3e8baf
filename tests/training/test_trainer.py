"""The loop on a tiny model: it learns, resumes exactly however it was stopped, exports what others load, and refuses what is wrong."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from tiny_models import write_llama

from jaxllm.adapters import LoraConfig, adapter_disabled, adapter_tensors, load_adapter
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.safetensors_source import read_file
from jaxllm.config import from_dict, to_dict
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.sharding import ShardingRules, make_mesh
from jaxllm.training import TrainConfig, Trainer
from jaxllm.training.objectives import add_score

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "tiny", tokenizer=True, max_position_embeddings=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 60), ("eval", 8)):
        records = ({"prompt": " ".join(rng.choices(words, k=rng.randint(1, 12))) + " ->", "completion": " yes yes"} for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config(model, data, out, **changes):
    tree = {
        "model": str(model),
        "output_dir": str(out),
        "data": {"path": [str(data / "train.jsonl")]},
        "eval_data": {"path": [str(data / "eval.jsonl")]},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 4,
        "max_length": 32,
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 2,
        "export_dtype": "float32",
    }
    return from_dict(TrainConfig, tree | changes)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return {line["step"]: line["loss"] for line in lines(out) if "loss" in line}


def weights(folder):
    source = open_checkpoint(folder)
    return {name: source.read(name) for name in source.tensors}


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, Trainer(config(model, data, out, eval_steps=4, eval_on_start=True)).train()


def test_it_learns_and_tells(whole):
    out, result = whole
    assert result.steps == 12 and result.stopped is None and result.skipped_steps == 0
    told = losses(out)
    assert list(told) == list(range(1, 13)) and told[12] < 0.8 * told[1]
    evaluated = {line["step"]: line["eval_loss"] for line in lines(out) if "eval_loss" in line}
    assert list(evaluated) == [0, 4, 8, 12] and evaluated[12] < evaluated[4] < evaluated[0] and result.eval_loss == evaluated[12]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "mfu", "skipped_steps"}
    assert all(keys <= line.keys() for line in lines(out) if "loss" in line)
    assert from_dict(TrainConfig, yaml.safe_load((out / "config.yaml").read_text())).max_steps == 12


def test_the_export_is_the_model_as_trained(whole, model, data):
    out, result = whole
    again = load_model(open_checkpoint(result.path), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules())
    assert again.config == load_model(open_checkpoint(model), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules()).config
    before, after = weights(model), weights(result.path)
    assert before.keys() == after.keys() and any(not np.array_equal(before[name], after[name]) for name in before)
    assert (result.path / "tokenizer.json").exists()
    # The loss that the run told is that of what it exported.
    exported = Trainer(config(result.path, data, out.parent / "unused"))
    assert exported.evaluate()["eval_loss"] == pytest.approx(result.eval_loss, rel=1e-5)


def test_a_run_that_ended_is_not_run_again(whole, model, data):
    out, result = whole
    before, exported = (out / "metrics.jsonl").read_text(), (result.path / "config.json").stat()
    again = Trainer(config(model, data, out, eval_steps=4)).train()
    assert again.path == result.path and (result.path / "config.json").stat().st_ino == exported.st_ino  # nor exported again
    assert again.steps == 12 and again.eval_loss == result.eval_loss and (out / "metrics.jsonl").read_text() == before


def start(settings):
    file = Path(settings.output_dir).parent / f"{Path(settings.output_dir).name}.yaml"
    file.write_text(yaml.safe_dump(to_dict(settings)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxllm.launch", "train", "--config", str(file), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_same(out, whole):
    reference, result = whole
    assert losses(out) == losses(reference), "not one loss differs, and none is missing or twice"
    ours, theirs = weights(out / "model"), weights(result.path)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(("seed", "kills"), [(0, 4), *(pytest.param(seed, 12, marks=pytest.mark.slow) for seed in range(5))])
def test_killed_at_random_moments(seed, kills, whole, model, data, tmp_path):
    """kill -9, also while a checkpoint is being written: the run that goes on is the run that was never stopped."""
    settings, rng = config(model, data, tmp_path / "run", eval_steps=4, save_steps=1), random.Random(seed)
    for kill in range(kills):
        process = start(settings)
        file = tmp_path / "run" / "metrics.jsonl"
        wanted = (len(losses(tmp_path / "run")) if file.exists() else 0) + rng.randint(1, 4)
        while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= wanted):
            time.sleep(0.01)
        saving = lambda: kill % 2 and not any((tmp_path / "run" / "checkpoints").glob(".saving-*"))  # noqa: B023
        while process.poll() is None and saving():  # every other time amid a save
            time.sleep(0.001)
        time.sleep(rng.random() * (0.01 if kill % 2 else 0.1))
        process.kill()
        if process.wait() == 0:
            break
    else:
        process = start(settings)
        assert process.wait(120) == 0, process.stderr.read()
    check_same(tmp_path / "run", whole)


def test_sigterm_saves_and_exits(whole, model, data, tmp_path):
    settings = config(model, data, tmp_path / "run", eval_steps=4, save_steps=1000)
    process = start(settings)
    file = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    told = json.loads(out)
    if told["steps"] < 12:
        assert told["stopped"] == "SIGTERM" and told["path"] is None
    assert Trainer(settings).train().steps == 12
    check_same(tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_passed_over(whole, model, data, tmp_path, caplog):
    settings = config(model, data, tmp_path / "run", eval_steps=4)
    Trainer(from_dict(TrainConfig, to_dict(settings) | {"max_steps": 12})).train()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    victim = max((file for file in newest.rglob("*") if file.is_file() and "arrays" in file.parts), key=lambda file: file.stat().st_size)
    with open(victim, "r+b") as stream:
        stream.truncate(victim.stat().st_size // 2)
    Trainer(settings).train()
    assert "step-00000012" in caplog.text and "passed over" in caplog.text
    check_same(tmp_path / "run", whole)


def test_lora_on_a_mesh_is_lora_on_one_device(model, data, tmp_path):
    lora = to_dict(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    told = []
    for name, mesh in (("one", {}), ("many", {"data": 2, "fsdp": 2, "tensor": 2})):
        changes = dict(lora=lora, eval_data=None, export=False, mesh=mesh, max_steps=4)
        Trainer(config(model, data, tmp_path / name, **changes)).train()
        told.append(losses(tmp_path / name))
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_a_run_that_was_stopped_early_stays_stopped(model, data, tmp_path):
    settings = config(model, data, tmp_path / "run", eval_steps=1, early_stopping_patience=2, optimizer={"learning_rate": 10.0})
    first = Trainer(settings).train()
    assert "early_stopping" in first.stopped and first.steps < 12
    again = Trainer(settings).train()
    assert again.steps == first.steps and again.stopped == first.stopped


def test_lora_trains_the_adapter_only(model, data, tmp_path):
    lora = to_dict(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1))
    settings = config(model, data, tmp_path / "run", lora=lora, eval_data=None, profile_steps=[2])
    trainer = Trainer(settings)
    frozen = {name: np.array(x) for name, x in trainer.frozen.items()}
    result = trainer.train()
    assert losses(tmp_path / "run")[12] < losses(tmp_path / "run")[1]
    for name, x in trainer.frozen.items():
        np.testing.assert_array_equal(x, frozen[name], err_msg=name)
    assert {file.name for file in result.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "no multiple"),
        ({"max_length": 4096}, "max_length=4096 exceeds"),
        ({"eval_data": None, "eval_steps": 3}, "need eval_data"),
        ({"lora": {"r": 4}, "ia3": {}}, "two adapters"),
        ({"quantize_base": "nf4"}, "give an adapter"),
        ({"mesh": {"fsdp": 4096}, "batch_size": 4096}, "needs 4096 devices"),
        ({"optimizer": {"name": "adamww"}}, "adamw"),
        ({"max_step": 3}, "max_steps"),
    ],
)
def test_wrong_settings(changes, message, model, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(config(model, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_wrong_data_and_folders(whole, model, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match="train.jsonl.*2"):
        (tmp_path / "bad.jsonl").rename(tmp_path / "train.jsonl")
        Trainer(config(model, tmp_path, tmp_path / "run", eval_data=None)).train()
    (tmp_path / "file").write_text("")
    with pytest.raises((CheckpointError, ConfigError), match="file"):
        Trainer(config(model, data, tmp_path / "file")).train()
    with pytest.raises(CheckpointError, match="choose another folder"):
        Trainer(config(model, data, "/proc/nowhere")).train()
    other = write_llama(tmp_path / "other", tokenizer=True, hidden_size=64, intermediate_size=32, max_position_embeddings=256)
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(config(other, data, whole[0], eval_steps=4)).train()


FULL = [("dpo", False), ("reward", False), pytest.param("kto", False, marks=pytest.mark.slow)]


def test_a_full_disk_loses_nothing(whole, model, data, tmp_path):
    """Files may grow to 30 kB at first, and there is no room for a checkpoint; then a file is in the way of the export."""
    settings = config(model, data, tmp_path / "run", eval_steps=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save step 2 .* make room"):
            Trainer(settings).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "run" / "model").write_text("")
    with pytest.raises(CheckpointError, match="a file is there"):
        Trainer(settings).train()
    (tmp_path / "run" / "model").unlink()
    trained = (tmp_path / "run" / "metrics.jsonl").read_text()
    Trainer(settings).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == trained
    check_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("name", "adapted"), [("dpo", True), ("orpo", True), ("simpo", True), ("kto", True), ("reward", True), *FULL])
def test_preferences(name, adapted, model, data, tmp_path):
    """What was preferred becomes likelier than what was not, or scores higher."""
    rng = random.Random(1)
    records = [{"prompt": f"{rng.choice('abcdef')} ->", "chosen": " yes", "rejected": " no"} for _ in range(30)]
    if name == "kto":
        sides = ("chosen", "rejected")
        records = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in records for side in sides]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lora = to_dict(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    changes = dict(objective={"name": name}, lora=lora if adapted else None, eval_data=None, gradient_accumulation_steps=2)
    trainer = Trainer(config(model, tmp_path, tmp_path / "run", **changes))
    before = {part: np.array(x) for part, x in trainer.frozen.items()}
    result = trainer.train()
    for part, x in trainer.frozen.items():  # the reference among it
        np.testing.assert_array_equal(x, before[part], err_msg=part)
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert last["loss"] < first["loss"]
    assert last["rewards_chosen"] - last["rewards_rejected"] > first["rewards_chosen"] - first["rewards_rejected"]
    if name in ("dpo", "kto"):  # nothing has moved yet: the model is its own reference
        assert abs(first["rewards_chosen"]) < 1e-5 and abs(first["rewards_rejected"]) < 1e-5
    if name == "reward":
        assert last["rewards_accuracy"] == 1
        check_classifier(trainer, result.path, model)
    elif not adapted:
        assert weights(result.path).keys() == weights(model).keys()


def check_classifier(trainer, path, base):
    """What was written is what transformers and PEFT read as a sequence classification of one label."""
    score = np.asarray(trainer.state.params["score.weight"])
    if trainer.config.adapter is None:
        values, tensors = json.loads((path / "config.json").read_text()), weights(path)
        assert values["architectures"] == ["LlamaForSequenceClassification"] and values["id2label"] == {"0": "LABEL_0"}
        assert tensors.keys() == weights(base).keys() - {"lm_head.weight"} | {"score.weight"}
        np.testing.assert_array_equal(tensors["score.weight"], score)
        return
    values, tensors = json.loads((path / "adapter_config.json").read_text()), read_file(path / "adapter_model.safetensors")
    assert values["task_type"] == "SEQ_CLS" and values["modules_to_save"] == ["score"]
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], score)
    bare = add_score(adapter_disabled(trainer.model()), saved=True, rngs=nnx.Rngs(1))
    again, adapter = load_adapter(bare, path)
    written = adapter_tensors(again, adapter)
    assert written.keys() == tensors.keys() and all(np.array_equal(written[name], tensors[name]) for name in tensors)


def test_objectives_refuse_other_records(model, data, tmp_path):
    with pytest.raises(ConfigError, match="chosen and rejected"):
        Trainer(config(model, data, tmp_path / "run", objective={"name": "simpo"}, max_steps=None))
