"""Hugging Face's config.json, rebuilt from the metadata of a GGUF file.

llama.cpp leaves out what its own code knows about an architecture (Gemma's activation, its every sixth layer, ...); the per-architecture
functions below put that back. Reference: llama.cpp's `convert_hf_to_gguf.py` (what is written) and `llama-model.cpp` (what is implied).
"""

from collections.abc import Callable

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.gguf_file import GGUFFile

# What changes the computation in ways no architecture listed here uses: present (and not this neutral value), the file is refused.
_NEUTRAL_VALUES = {
    "expert_count": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "use_parallel_residual": False,
}


class _Metadata:
    """Typed access to the keys of one architecture, whose errors name the key."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = str(file.metadata["general.architecture"])

    def get(self, key: str, default: object = None) -> object:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray | list) and key != "attention.sliding_window_pattern":
            if len(set(np.asarray(value).tolist())) != 1:
                raise CheckpointError(
                    f"{self.file.path} has a different {self.architecture}.{key} for each layer, which is not implemented: "
                    "use a model whose layers are alike."
                )
            value = np.asarray(value)[0].item()
        # Metadata holds float32; the shortest decimal that means the same float32 is what config.json said (1e-05, not 9.9999997e-06).
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> object:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file.path} lacks the metadata key {self.architecture}.{key}. Convert the model to GGUF again.")
        return value


def build_config(file: GGUFFile) -> dict[str, object]:
    """The content of config.json. Raises CheckpointError for an unknown architecture, a missing key, or one that is not implemented."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path} holds the architecture {architecture!r}, which is not implemented for GGUF. "
            f"Implemented: {', '.join(ARCHITECTURES)}. Use the model's safetensors checkpoint if jaxllm knows the model."
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight: a vocabulary but no model. Download the model's file.")
    metadata = _Metadata(file)
    for key, neutral in _NEUTRAL_VALUES.items():
        if metadata.get(key, neutral) != neutral:
            raise CheckpointError(f"{file.path} has {architecture}.{key} = {metadata.get(key)}, which is not implemented for GGUF files.")
    special = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        # llama.cpp writes no output matrix when it equals the embedding.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return ARCHITECTURES[architecture](metadata) | special


def _eos_ids(file: GGUFFile) -> int | list[int] | None:
    """End of text, of turn and of message all end a generation; one id if they are the same."""
    ids = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(id for id in ids if id is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _decoder(metadata: _Metadata, model_type: str, class_name: str, **extra: object) -> dict[str, object]:
    """What every architecture but GPT-2 shares."""
    hidden, heads = metadata.need("embedding_length"), metadata.need("attention.head_count")
    head_dim = metadata.get("attention.key_length", hidden // heads)
    if metadata.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{metadata.file.path} has values of another length than its keys, which is not implemented.")
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "hidden_size": hidden,
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.need("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.need("context_length"),
        # Written only where config.json had it; 10000 is both llama.cpp's and Hugging Face's default.
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, head_dim),
    }
    rotary_dim = metadata.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if model_type != "phi3":
            raise CheckpointError(f"{metadata.file.path} rotates {rotary_dim} of {head_dim} dimensions, not implemented for {model_type}.")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config | extra


def _rope_scaling(metadata: _Metadata, head_dim: int) -> dict[str, object] | None:
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    if "rope_freqs.weight" in metadata.file.tensors:
        return _llama3_scaling(metadata, head_dim)
    if "rope_factors_long.weight" in metadata.file.tensors:
        # The attention factor that llama.cpp stores beside these follows from the two lengths, by the formula Hugging Face applies.
        long, short = (metadata.file.read(f"rope_factors_{which}.weight").tolist() for which in ("long", "short"))
        return {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.need("rope.scaling.factor")}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": metadata.need("rope.scaling.factor")}
        scaling["original_max_position_embeddings"] = metadata.need("rope.scaling.original_context_length")
        renamed = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        for key, name in renamed.items():
            if (value := metadata.get(f"rope.scaling.{key}")) is not None:
                scaling[name] = value
        return scaling
    raise CheckpointError(f"{metadata.file.path} scales its rotary embedding by {kind!r} (factor {factor}), which is not implemented.")


def _llama3_scaling(metadata: _Metadata, head_dim: int) -> dict[str, object]:
    """Llama 3's scaling, of which GGUF keeps only the resulting divisor of each frequency.

    Every published model uses the same three constants; that they explain the stored divisors is checked.
    """
    divisors = metadata.file.read("rope_freqs.weight")
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * metadata.get("rope.freq_base", 10000.0) ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != wavelengths.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise CheckpointError(
            f"{metadata.file.path} has rope_freqs.weight that Llama 3's constants do not explain, which is not implemented. "
            "Use the model's safetensors checkpoint."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _llama(metadata: _Metadata) -> dict[str, object]:
    tensors = metadata.file.tensors
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    if window := metadata.get("attention.sliding_window"):
        return _decoder(metadata, "mistral", "MistralForCausalLM", sliding_window=window, **biases)
    return _decoder(metadata, "llama", "LlamaForCausalLM", **biases)


def _qwen2(metadata: _Metadata) -> dict[str, object]:
    return _decoder(metadata, "qwen2", "Qwen2ForCausalLM", use_sliding_window=False)


def _qwen3(metadata: _Metadata) -> dict[str, object]:
    bias = "blk.0.attn_q.bias" in metadata.file.tensors
    return _decoder(metadata, "qwen3", "Qwen3ForCausalLM", attention_bias=bias, use_sliding_window=False)


def _gemma2(metadata: _Metadata) -> dict[str, object]:
    config = _decoder(
        metadata,
        "gemma2",
        "Gemma2ForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=metadata.need("attn_logit_softcapping"),
        final_logit_softcapping=metadata.need("final_logit_softcapping"),
        sliding_window=metadata.need("attention.sliding_window"),
    )
    layers = range(config["num_hidden_layers"])
    config["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    config["query_pre_attn_scalar"] = _gemma_query_scalar(config, largest=46)
    return config


def _gemma3(metadata: _Metadata) -> dict[str, object]:
    window = metadata.get("attention.sliding_window")
    config = _decoder(
        metadata,
        "gemma3_text",
        "Gemma3ForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        rope_theta=metadata.need("rope.freq_base"),
        rope_local_base_freq=metadata.get("rope.freq_base_swa", 10000.0),
        attn_logit_softcapping=None,
        final_logit_softcapping=metadata.get("final_logit_softcapping"),
        sliding_window=window,
    )
    pattern = metadata.get("attention.sliding_window_pattern", 6)
    layers = range(config["num_hidden_layers"])
    # The pattern is "every n-th layer attends to everything", or a flag for each layer; no window at all means that all do.
    slides = [bool((layer + 1) % pattern) for layer in layers] if isinstance(pattern, int) else [bool(flag) for flag in pattern]
    config["layer_types"] = ["sliding_attention" if window and slides[layer] else "full_attention" for layer in layers]
    config["query_pre_attn_scalar"] = _gemma_query_scalar(config, largest=62)
    return config


def _gemma_query_scalar(config: dict[str, object], largest: int) -> int:
    """The 27B models scale queries by hidden_size / heads, the others by head_dim; llama.cpp tells them by their layers, so do we."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3(metadata: _Metadata) -> dict[str, object]:
    # A window of 0 is llama.cpp's mark for "none" (Phi-4).
    config = _decoder(metadata, "phi3", "Phi3ForCausalLM", sliding_window=metadata.get("attention.sliding_window") or None)
    original = metadata.get("rope.scaling.original_context_length")
    return config | ({"original_max_position_embeddings": original} if original else {})


def _smollm3(metadata: _Metadata) -> dict[str, object]:
    bias = "blk.0.attn_q.bias" in metadata.file.tensors
    config = _decoder(metadata, "smollm3", "SmolLM3ForCausalLM", attention_bias=bias, use_sliding_window=False, no_rope_layer_interval=4)
    config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return config


def _olmo2(metadata: _Metadata) -> dict[str, object]:
    if metadata.get("attention.sliding_window"):
        raise CheckpointError(f"{metadata.file.path} is OLMo 3 (an olmo2 file with a sliding window), which is not implemented for GGUF.")
    return _decoder(metadata, "olmo2", "Olmo2ForCausalLM", attention_bias=False)


def _gpt2(metadata: _Metadata) -> dict[str, object]:
    hidden, positions = metadata.need("embedding_length"), metadata.need("context_length")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": hidden,
        "n_layer": metadata.need("block_count"),
        "n_head": metadata.need("attention.head_count"),
        "n_inner": metadata.need("feed_forward_length"),
        "n_positions": positions,
        "n_ctx": positions,
        "layer_norm_epsilon": metadata.need("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


ARCHITECTURES: dict[str, Callable[[_Metadata], dict[str, object]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
}
