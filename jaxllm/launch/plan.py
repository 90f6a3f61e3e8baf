"""`jaxllm plan`: whether a model fits chips that are not here, and how fast they could serve or fine-tune it."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.config import from_dict, load_yaml
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.launch.command import Command
from jaxllm.launch.plan_table import print_serving_plan, print_training_plan
from jaxllm.pictures import check_picture, save_figure

if TYPE_CHECKING:
    from jaxllm.models import ModelConfig
    from jaxllm.planning import ServingPlan
    from jaxllm.planning.training import TrainingPlan

CONFIGURATIONS = Path(__file__).parents[2] / "configs" / "models"  # in a clone; what pip installs has none


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Compile the steps that the engine (or, with --train, the trainer) would run, for TPUs or GPUs that are not here or for this machine's
    processor, and tell what they take. No weights are needed.

    Example:

      jaxllm plan --model configs/models/llama-3-8b.yaml --topology v6e:2x2 --tensor 4 --max-num-seqs 64 --max-model-len 2048
      jaxllm plan --model configs/models/llama-3-8b.yaml --topology h100:2
      jaxllm plan --model demo --topology cpu --max-num-seqs 8 --max-model-len 512
      jaxllm plan --model configs/models/llama-3-8b.yaml --train configs/train/llama3_8b_lora.yaml --topology v5e:2x2
    """

    model: str | None = None
    "A config.json or a YAML file with its entries, a folder with a config.json, a .gguf file, `demo`, or a hub name (owner/name; only "
    "its config.json is fetched); with --train, by default the recipe's."
    topology: str
    "A chip and how many: v4, v5e, v5p, v6e or v7x, as in v6e:2x2 or v5p:2x2x1; a100, l4, h100, h200 or b200, 1 to 8 of them, as in "
    "h100:8; or cpu: this machine, measured."
    train: str | None = None
    "A training recipe in YAML: plan its optimiser step instead of serving."
    batch_size: int | None = None
    "Rows of that step, if not the recipe's."
    tensor: int | None = None
    "Devices to split each layer over; by default all."
    max_num_seqs: int = 64
    "Sequences that decode together."
    max_model_len: int = 2048
    "Tokens of each."
    max_num_batched_tokens: int | None = None
    "Tokens of prompts in one step; by default the engine's choice."
    page_size: int | None = None
    "Tokens in a page of the KV cache; by default the engine's choice."
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    "Of weights, and of the KV cache; auto is the checkpoint's own, and float32 on the CPU, as the engine has it."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    "Of the KV cache, if another."
    optimization_level: Literal["default", "O1"] = "default"
    "O1: the compiler takes less trouble, and a training step a fifth of the time; a serving step is worse for it."
    plot: str | None = None
    "Draw the roofline and the memory of a chip to this file (.png, .svg, .pdf)."

    def __post_init__(self) -> None:
        given = (name for name in ("max_num_batched_tokens", "page_size", "tensor") if getattr(self, name) is not None)
        self.check_counts("max_num_seqs", "max_model_len", *given)
        check_picture(self.plot)
        if self.train is None and (self.model is None or self.batch_size is not None):
            raise ConfigError("name a model to serve" if self.model is None else "batch_size is of a training step: give --train")
        if self.train is not None and self.topology.partition(":")[0] == "cpu":
            raise ConfigError(f"a plan has no more to tell of this machine than `jaxllm train --config {self.train} --dry-run`: take that")


def run(config: Config) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a chip's compiler is wanted, not the chip
    import jax
    import jax.numpy as jnp

    from jaxllm.models import config_from_hf
    from jaxllm.planning import find_topology, plan_serving
    from jaxllm.serving.defaults import default_dtype

    if config.optimization_level != "default":
        jax.config.update("jax_optimization_level", config.optimization_level)
    if config.train is not None:
        return _run_training(config)
    entries = read_model_entries(config.model)
    dtype = default_dtype(config.topology.partition(":")[0], entries) if config.dtype == "auto" else config.dtype
    model, topology = config_from_hf(entries), find_topology(config.topology, dtype=dtype)
    plan = plan_serving(
        model,
        topology,
        tensor=config.tensor or len(topology.devices),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        dtype=jnp.dtype(dtype),
        kv_cache_dtype=config.kv_cache_dtype,
    )
    title = f"{config.model} on {config.topology}"
    if not config.json:
        print_serving_plan(title, plan)
    _draw(config, plan, title)
    return asdict(plan) | {"model": config.model}


def _run_training(config: Config) -> dict[str, Any]:
    from jaxllm.planning import find_topology
    from jaxllm.planning.training import plan_training
    from jaxllm.training import TrainConfig

    given = {name: value for name in ("model", "batch_size") if (value := getattr(config, name)) is not None}
    recipe = from_dict(TrainConfig, load_yaml(config.train) | given, where=config.train)
    plan = plan_training(recipe, read_model_config(recipe.model), find_topology(config.topology))
    title = f"{recipe.model} on {config.topology}"
    if not config.json:
        print_training_plan(title, plan)
    _draw(config, plan, title)
    return asdict(plan) | {"model": recipe.model}


def _draw(config: Config, plan: ServingPlan | TrainingPlan, title: str) -> None:
    if config.plot is not None:
        from jaxllm.planning.plots import plot_plan

        print(f"wrote {save_figure(plot_plan(plan, title), config.plot)}", file=sys.stderr)


def read_model_config(name: str) -> ModelConfig:
    """The decoder that a file of Hugging Face's entries describes, or the model of that name. Raises CheckpointError, or ConfigError."""
    from jaxllm.models import config_from_hf

    return config_from_hf(read_model_entries(name))


def read_model_entries(name: str) -> Mapping[str, Any]:
    """Those of its config.json. Raises CheckpointError, or ConfigError."""
    from jaxllm.checkpoints import open_checkpoint

    path = Path(name)
    if not (path.is_file() and path.suffix in (".yaml", ".yml", ".json")):
        path = _find_model(name)
        if not (path / "config.json").is_file():
            return open_checkpoint(path).config  # a GGUF file, or a folder with one
        path = path / "config.json"
    if path.suffix != ".json":
        return load_yaml(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a model's configuration: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold the entries of a config.json, not {type(values).__name__}")
    return values


def _find_model(name: str) -> Path:
    """As a model is found; where none is, the error names the repository's own configurations that are near."""
    from jaxllm.checkpoints import resolve_model

    try:
        return resolve_model(name, only="config")
    except CheckpointError as error:
        known = {path.stem: path for path in CONFIGURATIONS.glob("*.yaml")}
        near = difflib.get_close_matches(name.split("/")[-1].lower().removesuffix(".yaml"), known, 3)
        if not near:
            raise
        files = " or ".join(os.path.relpath(known[stem]) for stem in near)
        raise CheckpointError(f"{error} A configuration is enough to plan with: did you mean {files}?") from error
