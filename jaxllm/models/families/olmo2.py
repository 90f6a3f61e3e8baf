"""OLMo 2: norms on the outputs of the branches, and on all queries and keys at once (arXiv 2501.00656)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("olmo2",)
IGNORED = ()


def from_hf(hf: HFConfig) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    return hf.decoder(norm_placement="post", qk_norm="full", qkv_bias=bias, output_bias=bias, norm_eps=hf.get("rms_norm_eps", 1e-5))


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
