"""One small module a family: `MODEL_TYPES`, `from_hf(config)`, `weights(config)` and the checkpoint entries it leaves out."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxllm.errors import CheckpointError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import gemma2, gemma3, gpt2, llama, mistral, olmo2, opt, phi3, qwen2, qwen3, smollm3
from jaxllm.models.families.hf import HFConfig, Weight

FAMILIES: dict[str, ModuleType] = {
    model_type: module
    for module in (llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, opt, smollm3, olmo2)
    for model_type in module.MODEL_TYPES
}


def family_of(model_type: str) -> ModuleType:
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise CheckpointError(f"model_type {model_type!r} is not implemented{hint}. Implemented: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a Hugging Face `config.json` describes."""
    hf = HFConfig(values)
    if "quantization_config" in values and values["quantization_config"]:
        method = values["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"config.json: checkpoints quantised with {method!r} are not implemented; use the unquantised one or a GGUF file"
        )
    family = family_of(hf.model_type)
    try:
        return family.from_hf(hf)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json ({hf.model_type}): an entry has the wrong type or value: {error}") from error


__all__ = ["FAMILIES", "Weight", "config_from_hf", "family_of"]
