"""SmolLM 3: Llama in which every fourth layer has no rotary embedding (NoPE)."""

from jaxllm.errors import CheckpointError
from jaxllm.models.config import LayerConfig, ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("smollm3",)
IGNORED = ()


def from_hf(hf: HFConfig) -> ModelConfig:
    n, interval = hf.require("num_hidden_layers"), hf.get("no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]  # 1: the layer has rotary positions
    if len(rotated) != n:
        raise CheckpointError(f"config.json: no_rope_layers has {len(rotated)} entries for {n} layers")
    bias = hf.get("attention_bias", False)
    windows = hf.layer_windows(lambda i: hf.get("use_sliding_window", False) and not rotated[i])
    layers = tuple(LayerConfig(window=w, rope="global" if r else None) for w, r in zip(windows, rotated, strict=True))
    return hf.decoder(
        layers=layers,
        rope=hf.rope(theta=2_000_000.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
