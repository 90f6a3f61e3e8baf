"""Adapters: LoRA and its kin, one description for training and for serving, in PEFT's names and format."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    attach=("adapter_disabled", "add_adapter", "has_adapter", "is_trainable", "merge_adapter", "unmerge_adapter", "with_dropout"),
    config=("AdapterConfig", "IA3Config", "LoraConfig", "PrefixTuningConfig", "PromptTuningConfig"),
    merged=("export_merged",),
    peft=("adapter_tensors", "load_adapter", "merge_into", "read_adapter_config", "save_adapter", "set_tensors"),
    quantize=("quantize_base",),
    variables=("AdapterConstant", "AdapterParam", "SavedParam"),
    virtual=("prepend_virtual_tokens",),
)
