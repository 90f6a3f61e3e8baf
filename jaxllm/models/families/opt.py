"""OPT: learned positions from row 2, LayerNorm, ReLU; OPT-350m normalises sums and embeds into fewer features (arXiv 2205.01068)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, norm, projections

MODEL_TYPES = ("opt",)
IGNORED = ()
OPTIONAL_PREFIX = "model."  # facebook/opt-* were saved as decoder.*


def from_hf(hf: HFConfig) -> ModelConfig:
    hf.refuse(layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    hidden, bias = hf.require("hidden_size"), hf.get("enable_bias", True)
    embed = hf.get("word_embed_proj_dim", hidden)
    pre = hf.get("do_layer_norm_before", True)
    return HFConfig({**hf.values, "intermediate_size": hf.require("ffn_dim")}).decoder(
        learned_positions=True,
        position_offset=2,
        activation=hf.activation("activation_function", "relu"),
        gated_mlp=False,
        norm="layer",
        norm_eps=1e-5,
        norm_placement="pre" if pre else "residual",
        final_norm=pre,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embed_dim=None if embed == hidden else embed,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    layer, ours = "model.decoder.layers.{i}", "layers.{i}"
    place = "norm" if config.norm_placement == "pre" else "post_norm"
    out = {
        "embed_tokens": Weight("model.decoder.embed_tokens.weight"),
        "embed_positions": Weight("model.decoder.embed_positions.weight"),
        **projections(f"{layer}.self_attn", f"{ours}.self_attn", "q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
        **projections(f"{layer}.self_attn", f"{ours}.self_attn", "o_proj", bias=config.output_bias, rename={"o_proj": "out_proj"}),
        **projections(layer, f"{ours}.mlp", "up_proj", "down_proj", bias=config.mlp_bias, rename={"up_proj": "fc1", "down_proj": "fc2"}),
        **norm(f"{layer}.self_attn_layer_norm", f"{ours}.attn_{place}", bias=True),
        **norm(f"{layer}.final_layer_norm", f"{ours}.mlp_{place}", bias=True),
    }
    if config.final_norm:
        out |= norm("model.decoder.final_layer_norm", "norm", bias=True)
    if config.embed_dim is not None:
        out["project_in.weight"] = Weight("model.decoder.project_in.weight")
        out["project_out.weight"] = Weight("model.decoder.project_out.weight")
    if not config.tie_embeddings:
        out["lm_head.weight"] = Weight("lm_head.weight")
    return out
