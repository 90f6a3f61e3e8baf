"""Tiny GGUF files made from Hugging Face tensors, with the value changes that llama.cpp's converter applies."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, VOCAB, CONTEXT = 32, 4, 2, 16, 64, 2, 48, 128


def linear(prefix: str, sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for name, shape in sizes.items()}


def hf_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny model of `architecture`, as transformers would save it (embeddings tied)."""
    if architecture == "gpt2":
        shapes = {"transformer.wte.weight": (VOCAB, HIDDEN), "transformer.wpe.weight": (CONTEXT, HIDDEN)}
        for layer in range(LAYERS):
            for name, (inputs, outputs) in {
                "attn.c_attn": (HIDDEN, 3 * HIDDEN),
                "attn.c_proj": (HIDDEN, HIDDEN),
                "mlp.c_fc": (HIDDEN, MLP),
                "mlp.c_proj": (MLP, HIDDEN),
            }.items():
                shapes[f"transformer.h.{layer}.{name}.weight"] = (inputs, outputs)
                shapes[f"transformer.h.{layer}.{name}.bias"] = (outputs,)
            for norm in ("ln_1", "ln_2"):
                shapes |= linear(f"transformer.h.{layer}.{norm}.", {"weight": (HIDDEN,), "bias": (HIDDEN,)})
        return shapes | linear("transformer.ln_f.", {"weight": (HIDDEN,), "bias": (HIDDEN,)})

    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        inner = {"self_attn.o_proj.weight": (HIDDEN, query), "mlp.down_proj.weight": (HIDDEN, MLP)}
        if architecture == "phi3":
            inner |= {"self_attn.qkv_proj.weight": (query + 2 * key, HIDDEN), "mlp.gate_up_proj.weight": (2 * MLP, HIDDEN)}
        else:
            for name, rows in {"q": query, "k": key, "v": key}.items():
                inner[f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
                if architecture == "qwen2":
                    inner[f"self_attn.{name}_proj.bias"] = (rows,)
            inner |= {"mlp.gate_proj.weight": (MLP, HIDDEN), "mlp.up_proj.weight": (MLP, HIDDEN)}
        norms = ["post_attention_layernorm"]
        norms += ["input_layernorm"] if architecture != "olmo2" else []
        norms += ["post_feedforward_layernorm"] if architecture in ("olmo2", "gemma2", "gemma3") else []
        norms += ["pre_feedforward_layernorm"] if architecture in ("gemma2", "gemma3") else []
        inner |= {f"{norm}.weight": (HIDDEN,) for norm in norms}
        if architecture in ("qwen3", "gemma3"):
            inner |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
        if architecture == "olmo2":
            inner |= {"self_attn.q_norm.weight": (query,), "self_attn.k_norm.weight": (key,)}
        shapes |= linear(f"model.layers.{layer}.", inner)
    return shapes


def converter_values(architecture: str, name: str, tensor: np.ndarray) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the values of one tensor."""
    if architecture in ("llama", "smollm3") and "q_proj" in name or architecture in ("llama", "smollm3") and "k_proj" in name:
        heads = HEADS if "q_proj" in name else KV_HEADS
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    return tensor


def base_metadata(architecture: str) -> dict[str, object]:
    """The keys, without the architecture's prefix, that the converter writes for the tiny model."""
    keys = {"block_count": LAYERS, "context_length": CONTEXT, "embedding_length": HIDDEN, "feed_forward_length": MLP}
    keys["attention.head_count"] = HEADS
    if architecture == "gpt2":
        return keys | {"attention.layer_norm_epsilon": 1e-5}
    keys |= {"attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 50000.0}
    keys |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    if architecture == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}
    if architecture == "gemma3":
        keys |= {"attention.sliding_window": 512}
    if architecture == "phi3":
        keys |= {"attention.sliding_window": 0, "rope.scaling.original_context_length": 64}
    return keys


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable:
    """make(architecture, metadata={...}, extra={gguf_name: array}, drop=(key, ...)) -> (path, {HF name: tensor})."""

    def make(architecture: str, metadata: dict | None = None, extra: dict | None = None, drop: tuple = (), config_name: str = ""):
        rng = np.random.default_rng(0)
        tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hf_shapes(config_name or architecture).items()}
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (base_metadata(architecture) | (metadata or {})).items():
            if key not in drop:
                add_value(writer, key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
        known = gguf.MODEL_ARCH_NAMES.values()
        if architecture in known:
            arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
            names = gguf.get_tensor_name_map(arch, LAYERS)
            for name, tensor in tensors.items():
                # llama.cpp's own table names the tensors: ours is checked against it.
                gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
                assert gguf_name, name
                writer.add_tensor(gguf_name, np.ascontiguousarray(converter_values(architecture, name, tensor)))
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, tensors

    return make
