"""Adapters: LoRA and its kin, one description for training and for serving, in PEFT's names and format."""

from jaxllm.adapters.attach import adapter_disabled, add_adapter, has_adapter, is_trainable, merge_adapter, unmerge_adapter, with_dropout
from jaxllm.adapters.config import AdapterConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from jaxllm.adapters.peft import adapter_tensors, load_adapter, merge_into, read_adapter_config, save_adapter, set_tensors
from jaxllm.adapters.quantize import quantize_base
from jaxllm.adapters.variables import AdapterConstant, AdapterParam, SavedParam
from jaxllm.adapters.virtual import prepend_virtual_tokens

__all__ = [
    "AdapterConfig",
    "AdapterConstant",
    "AdapterParam",
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SavedParam",
    "adapter_disabled",
    "adapter_tensors",
    "add_adapter",
    "has_adapter",
    "is_trainable",
    "load_adapter",
    "merge_adapter",
    "merge_into",
    "prepend_virtual_tokens",
    "quantize_base",
    "read_adapter_config",
    "save_adapter",
    "set_tensors",
    "unmerge_adapter",
    "with_dropout",
]
