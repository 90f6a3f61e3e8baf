"""Gemma 2: capped scores, every second layer slides, norms before and after each branch (arXiv 2408.00118)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("gemma2",)
IGNORED = ()


def from_hf(hf: HFConfig) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    hf = HFConfig({"head_dim": 256, "sliding_window": 4096, **hf.values})
    return hf.decoder(
        windows=hf.layer_windows(lambda i: i % 2 == 0),
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        norm_placement="both",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
        embed_scale=hf.require("hidden_size") ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
