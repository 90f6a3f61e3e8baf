"""The lines of metrics.jsonl, told to TensorBoard and Weights & Biases as well."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxllm.config import to_dict
from jaxllm.errors import ConfigError
from jaxllm.training.config import TrainConfig

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Watcher(Protocol):
    def write(self, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder `tensorboard`; what was written after the step that a run goes on from is purged."""

    def __init__(self, config: TrainConfig, out: Path, step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=f".{step}")

    def write(self, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self.writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `jaxllm` ($WANDB_PROJECT), named after its folder; $WANDB_MODE=offline needs no network. A run that goes on
    goes on there, and steps that come again are not told again."""

    def __init__(self, config: TrainConfig, out: Path, step: int):
        import wandb

        marker = out / "wandb_run_id"
        known = marker.read_text(encoding="utf-8").strip() if marker.exists() else None
        project = os.environ.get("WANDB_PROJECT", "jaxllm")
        self.run = wandb.init(project=project, name=out.name, dir=str(out), id=known, resume="allow", config=to_dict(config))
        marker.write_text(self.run.id, encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        self.run.log(_numbers(values), step=values["step"])

    def close(self) -> None:
        self.run.finish()


_KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_installed(config: TrainConfig) -> None:
    """Raises ConfigError for a place of `report_to` whose library is not here."""
    for name in config.report_to:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(f"report_to: {name} needs {_MODULES[name]}: pip install 'jaxllm[watch]', or leave it out")


def open_watchers(config: TrainConfig, out: Path, step: int) -> list[Watcher]:
    """Those of `report_to`, for a run that goes on after `step`."""
    return [_KINDS[name](config, out, step) for name in config.report_to]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "step" and value is not None}
