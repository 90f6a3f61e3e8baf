"""GPT-2: learned positions, LayerNorm, one fused projection stored [in, out] (Radford et al., 2019)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, norm, projections

MODEL_TYPES = ("gpt2",)
IGNORED = ("*.attn.bias", "*.attn.masked_bias")  # causal masks that old exports kept
OPTIONAL_PREFIX = "transformer."  # the published gpt2 was saved without it


def from_hf(hf: HFConfig) -> ModelConfig:
    hf.refuse(scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    hidden, max_positions = hf.require("n_embd"), hf.require("n_positions")
    names = {
        "hidden_size": hidden,
        "num_attention_heads": hf.require("n_head"),
        "num_hidden_layers": hf.require("n_layer"),
        "max_position_embeddings": max_positions,
        "intermediate_size": hf.get("n_inner", 4 * hidden),
    }
    return HFConfig({**hf.values, **names}).decoder(
        learned_positions=True,
        activation=hf.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    h, layer, ours = config.hidden_size, "transformer.h.{i}", "layers.{i}"
    out = {
        "embed_tokens": Weight("transformer.wte.weight"),
        "embed_positions": Weight("transformer.wpe.weight"),
        **norm(f"{layer}.ln_1", f"{ours}.attn_norm", bias=True),
        **norm(f"{layer}.ln_2", f"{ours}.mlp_norm", bias=True),
        **projections(f"{layer}.attn", f"{ours}.self_attn", "o_proj", bias=True, kind="conv1d", rename={"o_proj": "c_proj"}),
        **projections(
            f"{layer}.mlp",
            f"{ours}.mlp",
            "up_proj",
            "down_proj",
            bias=True,
            kind="conv1d",
            rename={"up_proj": "c_fc", "down_proj": "c_proj"},
        ),
        **norm("transformer.ln_f", "norm", bias=True),
    }
    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
        part = (n * h, (n + 1) * h)
        out[f"{ours}.self_attn.{name}.weight"] = Weight(f"{layer}.attn.c_attn.weight", "conv1d", part)
        out[f"{ours}.self_attn.{name}.bias"] = Weight(f"{layer}.attn.c_attn.bias", part=part)
    if not config.tie_embeddings:
        out["lm_head.weight"] = Weight("lm_head.weight")
    return out
