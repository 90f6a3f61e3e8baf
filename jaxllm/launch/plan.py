"""`jaxllm plan`: whether a model fits chips that are not here, and how fast they could serve it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxllm.config import load_yaml
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.launch.command import Command

if TYPE_CHECKING:
    from jaxllm.models import ModelConfig
    from jaxllm.planning import ServingPlan, StepReport


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Compile the steps that the engine would run, for TPUs or GPUs that are not here, and tell what they take. No weights are needed.

    Example:

      jaxllm plan --model configs/models/llama-3-8b.yaml --topology v6e:2x2 --tensor 4 --max-num-seqs 64 --max-model-len 2048
      jaxllm plan --model configs/models/llama-3-8b.yaml --topology h100:2
    """

    model: str
    "A config.json or a YAML file with its entries, a folder with a config.json, or a hub name (owner/name)."
    topology: str
    "A chip and how many: v4, v5e, v5p, v6e or v7x, as in v6e:2x2 or v5p:2x2x1; a100, l4, h100, h200 or b200, 1 to 8 of them, as in h100:8."
    tensor: int | None = None
    "Devices to split each layer over; by default all."
    max_num_seqs: int = 64
    "Sequences that decode together."
    max_model_len: int = 2048
    "Tokens of each."
    max_num_batched_tokens: int = 2048
    "Tokens of prompts in one step."
    page_size: int = 64
    "Tokens in a page of the KV cache."
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    "Of weights, and of the KV cache."
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    "Of the KV cache, if another."

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tensor is not None and self.tensor < 1:
            raise ConfigError(f"tensor must be at least 1, got {self.tensor}")


def run(config: Config) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a chip's compiler is wanted, not the chip
    import jax.numpy as jnp

    from jaxllm.planning import find_topology, plan_serving

    model, topology = read_model_config(config.model), find_topology(config.topology)
    plan = plan_serving(
        model,
        topology,
        tensor=config.tensor or len(topology.devices),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        dtype=jnp.dtype(config.dtype),
        kv_cache_dtype=config.kv_cache_dtype,
    )
    if not config.json:
        _print(config, plan)
    return asdict(plan) | {"model": config.model}


def read_model_config(name: str) -> ModelConfig:
    """The decoder that a file of Hugging Face's entries describes, or the model of that name. Raises CheckpointError, or ConfigError."""
    from jaxllm.checkpoints import resolve_model
    from jaxllm.models import config_from_hf

    path = Path(name)
    if not (path.is_file() and path.suffix in (".yaml", ".yml", ".json")):
        path = resolve_model(name)
        if path.is_file():
            raise CheckpointError(f"{path}: plan reads a config.json, a YAML file with its entries, or a folder with a config.json")
        path = path / "config.json"
    if path.suffix != ".json":
        return config_from_hf(load_yaml(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a model's configuration: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold the entries of a config.json, not {type(values).__name__}")
    return config_from_hf(values)


def _print(config: Config, plan: ServingPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console, gib = Console(), lambda n: f"{n / 2**30:.2f} GiB"
    console.print(f"{config.model} on {config.topology}, {plan.settings['tensor']} chips to a layer")
    memory = Table()
    memory.add_column("memory of a chip")
    memory.add_column("bytes", justify="right")
    for name in ("parameters", "kv_cache", "temporaries", "other", "total", "capacity"):
        memory.add_row(name.replace("_", " "), gib(plan.per_chip_bytes[name]))
    console.print(memory)
    steps = Table()
    for name in ("a step", "tokens", "moved", "least", "times least", "operations", "bound", "tokens/s at most", "collectives"):
        steps.add_column(name, justify="left" if name in ("a step", "collectives") else "right")
    for name, step in (("decode", plan.decode), ("prefill", plan.prefill)):
        if step is not None:
            steps.add_row(name, *_row(step, gib))
    console.print(steps)
    verdict = f"fits, with room for {plan.max_sequences} sequences of {config.max_model_len} tokens" if plan.fits else "does NOT fit"
    console.print(f"{verdict}; compiled in {plan.compile_s:.1f} s")
    if plan.remedy:
        console.print(f"remedy: {plan.remedy}")


def _row(step: StepReport, gib: Any) -> list[str]:
    return [
        str(step.tokens),
        gib(step.bytes_moved),
        gib(step.bytes_minimum),
        f"{step.bytes_moved / step.bytes_minimum:.2f}",
        f"{step.flops / 1e12:.3f} T",
        f"{1e3 * step.bound_s:.2f} ms",
        f"{step.tokens_per_s:,.0f}",
        ", ".join(f"{c.count} {c.kind}" for c in step.collectives if c.bytes >= 2**20) or "none of a MiB",
    ]
