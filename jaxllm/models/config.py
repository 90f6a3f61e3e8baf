"""What a decoder-only Transformer is made of, as data.

One `ModelConfig` describes every family that jaxllm serves; `families/` turns each Hugging Face `config.json` into one.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from jaxllm.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv 2104.09864) and how it is stretched to longer contexts.

    `dim` counts the rotated features of a head, the rest pass through. Each `kind` reads only its own fields; they mean what
    they mean in `transformers.modeling_rope_utils`.
    """

    dim: int
    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float = 1.0  # multiplies cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole features
    short_factors: tuple[float, ...] = ()  # longrope, up to original_max_positions
    long_factors: tuple[float, ...] = ()  # longrope, beyond

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angles depend on the length of its sequence as well as on its position."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer: a sliding window (None: all earlier tokens) and which rotary table is used."""

    window: int | None = None
    rope: Literal["global", "local"] | None = "global"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes count features, heads, tokens; `layers` has one entry a layer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    # Where a branch is normalised: its input, its output before the residual sum, both, or the sum itself.
    norm_placement: Literal["pre", "post", "both", "residual"] = "pre"
    final_norm: bool = True
    qk_norm: Literal["head", "full"] | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    learned_positions: bool = False
    position_offset: int = 0  # OPT's table starts at row 2
    embed_scale: float = 1.0
    embed_dim: int | None = None  # OPT-350m embeds into fewer features and projects; None: hidden_size
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "max_positions"):
            if (value := getattr(self, name)) < 1:
                raise CheckpointError(f"model configuration: {name} must be at least 1, not {value}")
        if not self.layers:
            raise CheckpointError("model configuration: it has no layers")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model configuration: {self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def embedding_dim(self) -> int:
        """Features of the table of embeddings, and of what the head multiplies."""
        return self.embed_dim or self.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention_scale if self.attention_scale is not None else 1 / math.sqrt(self.head_dim)

    @property
    def period(self) -> int:
        """Length of the shortest repeating block of layers (the last block may be cut short): what a scan runs over."""
        n = len(self.layers)
        return next(p for p in range(1, n + 1) if all(self.layers[i] == self.layers[i - p] for i in range(p, n)))

    @property
    def ropes(self) -> dict[str, RopeConfig]:
        return {name: rope for name, rope in (("global", self.rope), ("local", self.local_rope)) if rope is not None}

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)
