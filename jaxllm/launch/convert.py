"""`jaxllm convert`: write a model as a Hugging Face safetensors folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Read any checkpoint that jaxllm reads (safetensors folder, GGUF file, hub name) and write a Hugging Face folder.

    Examples:

      jaxllm convert --model model.Q4_K_M.gguf --out model-bf16
      jaxllm convert --model demo --adapter runs/first/adapter --out tuned
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    out: str
    "The folder to write."
    adapter: str | None = None
    "Folder of an adapter in PEFT's format (LoRA, DoRA, IA3), which is merged into the model's weights."
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    "Of the tensors written."
    overwrite: bool = False
    "Replace the folder if it is there and not empty."


def run(config: Config) -> dict[str, Any]:
    """Converts; returns what `jaxllm.checkpoints.convert` reports, or less of a merged model."""
    from jaxllm.checkpoints import convert

    if config.adapter is not None:
        from jaxllm.adapters import export_merged

        path = export_merged(config.model, config.adapter, config.out, dtype=config.dtype, overwrite=config.overwrite)
        print(f"wrote {config.out}", file=sys.stderr)
        return {"path": str(path), "dtype": config.dtype, "files": sorted(file.name for file in path.iterdir())}
    report = convert(config.model, config.out, dtype=config.dtype, overwrite=config.overwrite)
    print(f"wrote {config.out}", file=sys.stderr)
    return report
