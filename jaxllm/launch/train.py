"""`jaxllm train`: fine-tune a model."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command
from jaxllm.launch.plan_table import gib
from jaxllm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig, Command):
    """Fine-tune a model: all of it, or an adapter. Started again after it was cut short, a run goes on from its last checkpoint.

    Examples:

      jaxllm train --config configs/train/sft_lora.yaml
      jaxllm train --config configs/train/sft_lora.yaml --model demo --output-dir runs/first --dry-run
    """

    dry_run: bool = False
    "Show the first batch with what is learned in it, the memory that a step takes and its time, and train nothing."
    topology: str | None = None
    "With --dry-run: memory and time of chips that are not here, as in v5e:2x2 (see `jaxllm plan`), not of this machine."

    coordinator_address: str | None = None
    "For several hosts, each of which runs this: the first one's address, host:port; or auto, where JAX finds it (TPU, Slurm, MPI)."
    num_processes: int | None = None
    "How many run it; with auto, found too."
    process_id: int | None = None
    "Which of them this one is, from 0; with auto, found too."

    def __post_init__(self) -> None:
        super().__post_init__()
        several = self.coordinator_address is not None
        given = [getattr(self, name) is not None for name in ("num_processes", "process_id")]
        if (any(given) and not several) or (several and self.coordinator_address != "auto" and not all(given)):
            raise ConfigError("coordinator_address, num_processes and process_id go together, unless coordinator_address is auto")
        if several and self.dry_run:
            raise ConfigError("dry_run shows the work of one process: leave coordinator_address out")
        if self.topology is not None and not self.dry_run:
            raise ConfigError("topology is of chips that are not here: it goes with --dry-run")


def run(config: Config) -> dict[str, Any]:
    train = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    if config.dry_run:
        return _dry_run(train, config.topology)
    if config.coordinator_address is not None:
        from jaxllm.training.processes import join

        join(config.coordinator_address, config.num_processes, config.process_id)
    from jaxllm.training import Trainer

    result = Trainer(train).train()
    told = f"{result.steps} steps, loss {result.loss:.4f}" if result.loss is not None else f"{result.steps} steps"
    told += f", eval_loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
    told += f"; stopped: {result.stopped}" if result.stopped else ""
    print(f"[{told}]" + (f" {result.path}" if result.path else ""), file=sys.stderr)
    return {**dataclasses.asdict(result), "path": None if result.path is None else str(result.path)}


def _dry_run(config: TrainConfig, topology: str | None) -> dict[str, Any]:
    from rich.console import Console

    from jaxllm.checkpoints import open_checkpoint, resolve_model
    from jaxllm.models import config_from_hf
    from jaxllm.planning import find_topology
    from jaxllm.planning.training import measure_step, plan_training
    from jaxllm.tokenizers import load_tokenizer
    from jaxllm.training.data import dry_run
    from jaxllm.training.trainer import count_steps, training_data

    console, path = Console(), resolve_model(config.model)
    data = training_data(config, load_tokenizer(path))
    report = dry_run(data, console=console)
    steps, model = count_steps(config, data), config_from_hf(open_checkpoint(path).config)
    if topology is not None:
        plan = plan_training(config, model, find_topology(topology))
        held, seconds, how = plan.per_chip_bytes, plan.step and plan.step.bound_s, f"the least that {topology} can take"
    else:
        plan = measure_step(config, model)
        held, seconds, how = plan.per_device_bytes, plan.step_s, "measured here, on full rows"
    total_s = None if seconds is None else steps * seconds
    parts = ", ".join(f"{name} {gib(held[name])}" for name in ("parameters", "optimizer", "temporaries"))
    fits = "" if plan.fits else ": does NOT fit"
    console.print(f"memory of a device: {gib(held['total'])} of {gib(held['capacity'])} ({parts}){fits}", highlight=False)
    if seconds is not None:
        console.print(f"time: {steps:,} steps of {seconds:.3g} s ({how}), {_duration(total_s)} in all", highlight=False)
    return report | {"steps": steps, "total_s": total_s, "expected": dataclasses.asdict(plan)}


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
