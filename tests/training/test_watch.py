"""A run told to TensorBoard and to Weights & Biases (offline), and drawn."""

import importlib.util
import json

import pytest

from jaxllm.config import from_dict
from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.training import TrainConfig, plot_run
from jaxllm.training import watch as watching

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


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for lines in (LINES[:2], LINES[2:]):
        tell(watching.open_watchers(config(tmp_path, "wandb"), tmp_path, lines[0]["step"] - 1)[0], lines)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2 and (tmp_path / "wandb_run_id").exists()


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
