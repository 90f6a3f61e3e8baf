"""`jaxllm train`: fine-tune a model."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from jaxllm.launch.command import Command
from jaxllm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig, Command):
    """Fine-tune a model: all of it, or an adapter. Started again after it was cut short, a run goes on from its last checkpoint.

    Examples:

      jaxllm train --config configs/train/sft_lora.yaml
      jaxllm train --config configs/train/sft_lora.yaml --model demo --output-dir runs/first --dry-run
    """

    dry_run: bool = False
    "Show the first batch with what is learned in it, count the rest, and train nothing."


def run(config: Config) -> dict[str, Any]:
    train = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    if config.dry_run:
        return _dry_run(train)
    from jaxllm.training import Trainer

    result = Trainer(train).train()
    told = f"{result.steps} steps, loss {result.loss:.4f}" if result.loss is not None else f"{result.steps} steps"
    told += f", eval_loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
    told += f"; stopped: {result.stopped}" if result.stopped else ""
    print(f"[{told}]" + (f" {result.path}" if result.path else ""), file=sys.stderr)
    return {**dataclasses.asdict(result), "path": None if result.path is None else str(result.path)}


def _dry_run(config: TrainConfig) -> dict[str, Any]:
    from rich.console import Console

    from jaxllm.checkpoints import resolve_model
    from jaxllm.tokenizers import load_tokenizer
    from jaxllm.training.data import dry_run, make_dataset

    tokenizer = load_tokenizer(resolve_model(config.model))
    data = make_dataset(config.data, tokenizer, batch_size=config.batch_size, max_length=config.text_length, seed=config.seed)
    return dry_run(data, console=Console())
