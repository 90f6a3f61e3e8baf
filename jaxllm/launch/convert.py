"""`jaxllm convert`: write a model as a Hugging Face safetensors folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Read any checkpoint that jaxllm reads (safetensors folder, GGUF file, hub name) and write a Hugging Face folder.

    Example:

      jaxllm convert --model model.Q4_K_M.gguf --out model-bf16
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    out: str
    "The folder to write."
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    "Of the tensors written."
    overwrite: bool = False
    "Replace the folder if it is there and not empty."


def run(config: Config) -> dict[str, Any]:
    """Converts; returns what `jaxllm.checkpoints.convert` reports."""
    from jaxllm.checkpoints import convert

    report = convert(config.model, config.out, dtype=config.dtype, overwrite=config.overwrite)
    print(f"wrote {config.out}", file=sys.stderr)
    return report
