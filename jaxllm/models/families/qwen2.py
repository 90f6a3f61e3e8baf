"""Qwen 2 and 2.5: Llama with biases on queries, keys and values (arXiv 2407.10671)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("qwen2",)
IGNORED = ("*.rotary_emb.inv_freq",)


def windows(hf: HFConfig) -> list[int | None]:
    """`sliding_window` is in every Qwen configuration and means something only with `use_sliding_window`."""
    if not hf.get("use_sliding_window", False):
        return [None] * hf.require("num_hidden_layers")
    first = hf.get("max_window_layers", 28)
    return hf.layer_windows(lambda i: hf.get("sliding_window") is not None and i >= first)


def from_hf(hf: HFConfig) -> ModelConfig:
    return hf.decoder(windows=windows(hf), qkv_bias=True)


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
