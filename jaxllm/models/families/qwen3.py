"""Qwen 3: no biases, RMSNorm on each head's queries and keys (arXiv 2505.09388)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights
from jaxllm.models.families.qwen2 import windows

MODEL_TYPES = ("qwen3",)
IGNORED = ()


def from_hf(hf: HFConfig) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    # transformers defaults head_dim to 128 here, not to hidden_size / heads
    head_dim = hf.get("head_dim", 128)
    hf = HFConfig({**hf.values, "head_dim": head_dim})
    return hf.decoder(windows=windows(hf), qk_norm="head", qkv_bias=bias, output_bias=bias)


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
