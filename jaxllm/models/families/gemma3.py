"""Gemma 3, text: five local layers to one global, a rotary base for each, normalised queries and keys (arXiv 2503.19786).

The larger checkpoints are multimodal (`gemma3`): jaxllm serves their language model and leaves the vision tower on disk.
"""

from jaxllm.models.config import LayerConfig, ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("gemma3_text", "gemma3")
ALTERNATIVE_PREFIXES = {"language_model.model.": "model.language_model."}  # before and since transformers 4.52
IGNORED = ("*vision_tower.*", "*multi_modal_projector.*")
_PATTERN = 6
_DEFAULTS = {  # of transformers' Gemma3TextConfig: the multimodal checkpoints' text_config leaves out what equals them
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
}


def from_hf(hf: HFConfig) -> ModelConfig:
    family = hf.model_type
    text = hf.get("text_config", {}) if family == "gemma3" else hf.values
    hf = HFConfig({**_DEFAULTS, **{k: v for k, v in text.items() if v is not None}, "model_type": family})
    hf.refuse(use_bidirectional_attention=False, attn_logit_softcapping=None)
    pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", _PATTERN))
    windows = hf.layer_windows(lambda i: (i + 1) % pattern != 0)
    bias = hf.get("attention_bias", False)
    rope = hf.rope("full_attention", theta=1_000_000.0)
    if hf.get("rope_parameters"):
        local = hf.rope("sliding_attention", theta=10_000.0)
    else:
        local = hf.parse_rope({"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}, 10_000.0)
    return hf.decoder(
        layers=tuple(LayerConfig(window=w, rope="global" if w is None else "local") for w in windows),
        rope=rope,
        local_rope=local,
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        norm_placement="both",
        qk_norm="head",
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=hf.get("final_logit_softcapping"),
        embed_scale=hf.require("hidden_size") ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config, "model." if config.family == "gemma3_text" else "language_model.model.")
