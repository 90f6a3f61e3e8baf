"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, LongRoPE and, in Phi-4-mini, partly rotated heads (arXiv 2404.14219)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("phi3",)
IGNORED = ("*.rotary_emb.inv_freq",)


def from_hf(hf: HFConfig) -> ModelConfig:
    return hf.decoder(windows=[hf.get("sliding_window")] * hf.require("num_hidden_layers"))


def weights(config: ModelConfig) -> dict[str, Weight]:
    q, kv, f = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    attention, mlp = "model.layers.{i}.self_attn.qkv_proj.weight", "model.layers.{i}.mlp.gate_up_proj.weight"
    return {
        **llama_weights(config),
        "layers.{i}.self_attn.q_proj.weight": Weight(attention, part=(0, q)),
        "layers.{i}.self_attn.k_proj.weight": Weight(attention, part=(q, q + kv)),
        "layers.{i}.self_attn.v_proj.weight": Weight(attention, part=(q + kv, q + 2 * kv)),
        "layers.{i}.mlp.gate_proj.weight": Weight(mlp, part=(0, f)),
        "layers.{i}.mlp.up_proj.weight": Weight(mlp, part=(f, 2 * f)),
    }
