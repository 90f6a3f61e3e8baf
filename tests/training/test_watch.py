"""A run told to TensorBoard and to Weights & Biases (offline), and drawn."""

import importlib.util
import json

import pytest

from jaxllm.config import from_dict
from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.training import TrainConfig, plot_run
from jaxllm.training import watch as watching

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LINES = [{"step": i, "loss": 2.0 / i, "learning_rate": 0.1, "mfu": None, "tokens": 10 * i} for i in range(1, 5)]


def config(folder, *report_to):
    data = {"path": [str(folder)]}
    return from_dict(TrainConfig, {"model": "demo", "output_dir": str(folder), "data": data, "report_to": list(report_to)})


def tell(watcher, lines):
    for line in lines:
        watcher.write(line)
    watcher.close()


def test_tensorboard_shows_every_number_and_a_run_that_goes_on_purges(tmp_path):
    Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    for step, lines in ((0, LINES), (2, LINES[2:])):
        tell(watching.open_watchers(config(tmp_path, "tensorboard"), tmp_path, step)[0], lines)
    told, purged = {}, []
    for file in sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == 1:
                purged.append(event.step)
            told |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert told["loss", 4] == 0.5 and ("mfu", 1) not in told and len(told) == 4 * 3 and purged == [3]


def records(file):
    """Those of a `.wandb` file: LevelDB's log after a header of 7 bytes, whose pieces (checksum, length, kind) lie in blocks of 32 KiB."""
    Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 < len(data):
        if (left := -at % 32768) < 7:  # no room for a piece's head
            at += left
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # the whole of it, or its last
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline(tmp_path, monkeypatch):
    """A run, and the same run going on: each writes a file with its numbers, under one id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for lines in (LINES[:2], LINES[2:]):
        tell(watching.open_watchers(config(tmp_path, "wandb"), tmp_path, lines[0]["step"] - 1)[0], lines)
    told, ids = {}, set()
    for record in (record for file in tmp_path.glob("wandb/offline-run-*/*.wandb") for record in records(file)):
        ids |= {record.run.run_id} if record.HasField("run") else set()
        items = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        told |= {(name, items["_step"]): value for name, value in items.items() if not name.startswith("_")}
    assert told == {(name, line["step"]): line[name] for line in LINES for name in ("loss", "learning_rate", "tokens")}
    assert ids == {(tmp_path / "wandb_run_id").read_text()}


def test_what_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"wandb.*jaxllm\[watch\]"):
        watching.check_installed(config(tmp_path, "wandb"))
    with pytest.raises(ConfigError, match="tensorboard"):
        config(tmp_path, "tensorbord")


def test_a_run_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = [*LINES, {"step": 4, "eval_loss": 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    axes = {axes.get_title(): axes for axes in plot_run(tmp_path).axes}
    assert list(axes) == ["loss", "learning_rate"]
    loss, evaluated = axes["loss"].lines
    assert list(loss.get_ydata()) == [line["loss"] for line in LINES] and list(evaluated.get_xdata()) == [4]
    assert main(["plot", "--run", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "--run", str(tmp_path), "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert main(["plot", "--run", str(tmp_path / "none")]) == 2
    assert "output_dir of a training run" in capsys.readouterr().err
