"""Llama 1 to 3.x, and what ships under its name: SmolLM 2, Falcon 3, TinyLlama, Yi, ... (`LlamaForCausalLM`)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("llama",)
IGNORED = ("*.rotary_emb.inv_freq",)  # buffers that old exports kept


def from_hf(hf: HFConfig) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    return hf.decoder(qkv_bias=bias, output_bias=bias, mlp_bias=hf.get("mlp_bias", False))


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
