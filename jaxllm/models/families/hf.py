"""What the families share: reading a Hugging Face `config.json`, and saying where each parameter lives in a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.errors import CheckpointError
from jaxllm.models.config import LayerConfig, ModelConfig, RopeConfig

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_TYPES: dict[str, tuple[tuple[str, ...], Any]] = {  # what entries must be, when they are there and not null
    "text": (("model_type", "hidden_act", "hidden_activation", "activation_function"), str),
    "a whole number": (
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "max_window_layers"),
            *("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "ffn_dim", "word_embed_proj_dim", "no_rope_layer_interval"),
            *("sliding_window_pattern", "_sliding_window_pattern"),
        ),
        int,
    ),
    "a number": (
        (
            *("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        ),
        (int, float),
    ),
    "true or false": (
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "enable_bias", "do_layer_norm_before"),
            "use_bidirectional_attention",
        ),
        bool,
    ),
    "a list": (("layer_types", "no_rope_layers"), (list, tuple)),
    "an object": (("rope_parameters", "rope_scaling", "text_config", "quantization_config"), Mapping),
}


@dataclass(frozen=True)
class HFConfig:
    """A `config.json` whose missing or unsupported entries become errors that name them."""

    values: Mapping[str, Any]

    def __post_init__(self):
        for kind, (keys, types) in _TYPES.items():
            for key in keys:
                value = self.values.get(key)
                if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and types is not bool)):
                    raise CheckpointError(f"config.json: {key} must be {kind}, not {value!r:.100}")

    @property
    def model_type(self) -> str:
        return self.require("model_type")

    def require(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise CheckpointError(f"config.json ({self.values.get('model_type', 'no model_type')}) lacks {key!r}")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, **unsupported: Any) -> None:
        """Raise if an entry differs from the only value that is implemented."""
        for key, only in unsupported.items():
            if self.get(key, only) != only:
                raise CheckpointError(
                    f"config.json: {key}={self.values[key]!r} is not implemented for {self.model_type} (only {only!r} is)"
                )

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        name = self.get(key, default)
        if name not in _ACTIVATIONS:
            raise CheckpointError(f"config.json: {key}={name!r} is not implemented; one of {', '.join(_ACTIVATIONS)} is needed")
        return _ACTIVATIONS[name]

    def head_dim(self) -> int:
        if (explicit := self.get("head_dim")) is not None:
            return explicit
        size, heads = self.require("hidden_size"), self.require("num_attention_heads")
        if size % heads:
            raise CheckpointError(
                f"config.json: hidden_size {size} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
            )
        return size // heads

    def layer_windows(self, default_type) -> list[int | None]:
        """The sliding window of each layer, from `layer_types`, or from `default_type(i) -> bool` (does layer i slide?)."""
        n, window = self.require("num_hidden_layers"), self.get("sliding_window")
        types = self.get("layer_types") or ["sliding_attention" if default_type(i) else "full_attention" for i in range(n)]
        if len(types) != n:
            raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {n} layers")
        if unknown := [t for t in types if t not in ("sliding_attention", "full_attention")]:
            raise CheckpointError(
                f"config.json: layer_types {', '.join(dict.fromkeys(map(str, unknown)))} not implemented "
                "(full_attention and sliding_attention are)"
            )
        if "sliding_attention" in types and window is None:
            raise CheckpointError("config.json: layer_types has sliding_attention, but sliding_window is missing")
        return [window if t == "sliding_attention" else None for t in types]

    def rope(self, layer_type: str | None = None, *, theta: float = 10_000.0) -> RopeConfig:
        """Rotary settings, in the form of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`)."""
        values = self.get("rope_parameters")
        if values is not None and layer_type is not None and layer_type in values:
            values = values[layer_type]
        if values is None:
            values = {"rope_theta": self.get("rope_theta", theta), **(self.get("rope_scaling") or {})}
        return self.parse_rope(values, theta)

    def parse_rope(self, values: Mapping[str, Any], theta: float) -> RopeConfig:
        kind = values.get("rope_type", values.get("type")) or "default"
        if kind not in ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su"):
            raise CheckpointError(
                f"config.json: rotary scaling {kind!r} is not implemented (default, linear, dynamic, llama3, yarn, longrope are)"
            )
        if kind == "su" or (kind == "yarn" and "short_factor" in values):  # what early Phi-3 exports called it
            kind = "longrope"
        theta = values.get("rope_theta") or self.get("rope_theta", theta)
        partial = values.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        base = {"dim": int(self.head_dim() * partial), "theta": float(theta), "kind": kind}
        if kind == "default":
            return RopeConfig(**base)

        def need(key: str) -> Any:
            if values.get(key) is None:
                raise CheckpointError(f"config.json: rotary scaling {kind!r} lacks {key!r}")
            return values[key]

        max_positions = self.require("max_position_embeddings")
        original = values.get("original_max_position_embeddings") or self.get("original_max_position_embeddings", max_positions)
        if kind == "longrope":
            original = self.get("original_max_position_embeddings", original)  # transformers prefers the outer one
            factor = values.get("factor") or max_positions / original
            return RopeConfig(
                **base,
                original_max_positions=original,
                attention_factor=values.get("attention_factor") or _longrope_attention_factor(factor, original),
                short_factors=tuple(need("short_factor")),
                long_factors=tuple(need("long_factor")),
            )
        rope = RopeConfig(**base, factor=float(need("factor")), original_max_positions=original)
        if kind == "llama3":
            extra = {"low_freq_factor": need("low_freq_factor"), "high_freq_factor": need("high_freq_factor")}
            return RopeConfig(**{**vars(rope), **extra, "original_max_positions": need("original_max_position_embeddings")})
        if kind == "yarn":
            extra = {k: values[k] for k in ("beta_fast", "beta_slow", "truncate") if values.get(k) is not None}
            return RopeConfig(**{**vars(rope), **extra, "attention_factor": _yarn_attention_factor(values)})
        return rope

    def decoder(self, **fields: Any) -> ModelConfig:
        """A ModelConfig from the entries that most families spell alike; `fields` adds to them and overrides them."""
        heads = self.require("num_attention_heads")
        windows = fields.pop("windows", None) or [None] * self.require("num_hidden_layers")
        base: dict[str, Any] = {
            "family": self.model_type,
            "vocab_size": self.require("vocab_size"),
            "hidden_size": self.require("hidden_size"),
            "intermediate_size": self.require("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.head_dim(),
            "layers": tuple(LayerConfig(w, None if fields.get("learned_positions") else "global") for w in windows),
            "max_positions": self.require("max_position_embeddings"),
            "activation": self.activation(),
            "norm_eps": self.get("rms_norm_eps", 1e-6),
            "tie_embeddings": self.get("tie_word_embeddings", False),
        }
        if "rope" not in fields and not fields.get("learned_positions"):
            base["rope"] = self.rope()
        return ModelConfig(**{**base, **fields})


def _longrope_attention_factor(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention_factor(values: Mapping[str, Any]) -> float:
    if values.get("attention_factor") is not None:
        return values["attention_factor"]
    scale = lambda m: 1.0 if values["factor"] <= 1 else 0.1 * m * math.log(values["factor"]) + 1.0
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)


@dataclass(frozen=True)
class Weight:
    """Where a parameter lives in a Hugging Face checkpoint; `{i}` in the name is the layer.

    Matrices are stored [out, in], as ours are, and `conv1d` ones [in, out]; `part` is the range [start, stop) of the output
    features that a parameter takes of a fused tensor.
    """

    name: str
    kind: Literal["plain", "conv1d"] = "plain"
    part: tuple[int, int] | None = None


def projections(
    theirs: str, ours: str, *names: str, bias: bool, kind: Literal["plain", "conv1d"] = "plain", rename: Mapping[str, str] | None = None
) -> dict[str, Weight]:
    """Entries for Linear modules `ours.name` that a checkpoint calls `theirs.name` (or what `rename` says)."""
    out = {}
    for name in names:
        prefix = f"{theirs}.{(rename or {}).get(name, name)}"
        out[f"{ours}.{name}.weight"] = Weight(f"{prefix}.weight", kind)
        if bias:
            out[f"{ours}.{name}.bias"] = Weight(f"{prefix}.bias")
    return out


def norm(theirs: str, ours: str, *, bias: bool = False) -> dict[str, Weight]:
    return {f"{ours}.{p}": Weight(f"{theirs}.{p}") for p in (("weight", "bias") if bias else ("weight",))}


def llama_weights(c: ModelConfig, prefix: str = "model.") -> dict[str, Weight]:
    """The names that Llama set and most families kept."""
    layer = f"{prefix}layers.{{i}}"
    mlp = ("gate_proj", "up_proj", "down_proj") if c.gated_mlp else ("up_proj", "down_proj")
    weights = {
        "embed_tokens": Weight(f"{prefix}embed_tokens.weight"),
        **projections(f"{layer}.self_attn", "layers.{i}.self_attn", "q_proj", "k_proj", "v_proj", bias=c.qkv_bias),
        **projections(f"{layer}.self_attn", "layers.{i}.self_attn", "o_proj", bias=c.output_bias),
        **projections(f"{layer}.mlp", "layers.{i}.mlp", *mlp, bias=c.mlp_bias),
        **norm(f"{prefix}norm", "norm"),
    }
    if c.qk_norm:
        for name in ("q_norm", "k_norm"):
            weights |= norm(f"{layer}.self_attn.{name}", f"layers.{{i}}.self_attn.{name}")
    # Llama's "post_attention_layernorm" stands before the MLP; where a family normalises outputs it means what it says.
    names = {
        "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "post": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
        "both": {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
    }[c.norm_placement]
    for ours, theirs in names.items():
        weights |= norm(f"{layer}.{theirs}", f"layers.{{i}}.{ours}")
    if not c.tie_embeddings:
        weights["lm_head.weight"] = Weight("lm_head.weight")
    return weights
