"""A GGUF file under Hugging Face's tensor names, with the value changes of llama.cpp's converter undone."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.checkpoints.gguf_config import build_config
from jaxllm.checkpoints.source import Index, TensorInfo
from jaxllm.errors import CheckpointError
from jaxllm.gguf_file import open_gguf

# GGUF's name within a layer -> Hugging Face's.
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA_LAYER = _LLAMA_LAYER | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_LAYER_NAMES = {
    "llama": _LLAMA_LAYER,
    "smollm3": _LLAMA_LAYER,
    "qwen2": _LLAMA_LAYER,
    "qwen3": _LLAMA_LAYER | _QK_NORMS,
    "gemma2": _GEMMA_LAYER,
    "gemma3": _GEMMA_LAYER | _QK_NORMS,
    "olmo2": {name: hf for name, hf in _LLAMA_LAYER.items() if not name.endswith("_norm")} | _QK_NORMS | _POST_NORMS,
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_GLOBAL_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
# Tensors that became part of the config.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


class _Origin(NamedTuple):
    """Where a Hugging Face tensor comes from and how its values are restored: rows taken in another order, transposed, shifted."""

    name: str
    rows: np.ndarray | None = None
    transpose: bool = False
    shift: float = 0.0


class GGUFSource:
    """A TensorSource over one GGUF file."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open_gguf(path)
        self.config = build_config(self._file)
        architecture = str(self._file.metadata["general.architecture"])
        self._origins: dict[str, _Origin] = {}
        unknown = []
        for name in self._file.tensors:
            if name in _IN_CONFIG:
                continue
            if (hf_name := _hf_name(architecture, name)) is None:
                unknown.append(name)
            else:
                self._origins[hf_name] = self._origin(architecture, name)
        if unknown:
            shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise CheckpointError(
                f"{path} has tensors that the architecture {architecture!r} does not use: {shown}. "
                "It may be a variant (mixture of experts, multimodal, ...) that is not implemented for GGUF."
            )
        self.tensors = {name: self._info(origin) for name, origin in self._origins.items()}

    @property
    def quantized(self) -> bool:
        """Whether any tensor is stored in quantised blocks, which are read as float32."""
        return any(tensor.quantized for tensor in self._file.tensors.values())

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self._file.metadata

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if name not in self._origins:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it holds {len(self._origins)} others.")
        origin, index = self._origins[name], tuple(index or ())
        if origin.transpose:
            rows = index[1] if len(index) > 1 else None
            values = self._file.read(origin.name, rows).T
            return np.ascontiguousarray(values[index[:1]])
        rows = index[0] if index else None
        if origin.rows is not None:
            rows = origin.rows[rows or slice(None)]
        values = self._file.read(origin.name, rows)
        if len(index) > 1:
            # The copy lets go of the columns that were not asked for.
            values = values[(slice(None), *index[1:])].copy()
        return values + np.asarray(origin.shift, values.dtype) if origin.shift else values

    def _info(self, origin: _Origin) -> TensorInfo:
        tensor = self._file.tensors[origin.name]
        return TensorInfo(tensor.shape[::-1] if origin.transpose else tensor.shape, tensor.dtype.name)

    def _origin(self, architecture: str, name: str) -> _Origin:
        if architecture in ("llama", "smollm3") and (match := re.search(r"\.attn_([qk])\.(weight|bias)$", name)):
            heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            return _Origin(name, rows=_rotary_rows(self._file.tensors[name].shape[0], heads))
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            # Gemma multiplies by 1 + weight; llama.cpp stores that sum.
            return _Origin(name, shift=-1.0)
        if architecture == "gpt2" and re.fullmatch(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
            # GPT-2's weights are [in, out] in Hugging Face's files.
            return _Origin(name, transpose=True)
        return _Origin(name)


def _hf_name(architecture: str, name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None if the architecture has no such tensor."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        prefix = "transformer.h" if architecture == "gpt2" else "model.layers"
        hf = _LAYER_NAMES[architecture].get(inner)
        return hf and f"{prefix}.{layer}.{hf}.{kind}"
    stem, _, kind = name.rpartition(".")
    hf = (_GPT2_GLOBAL_NAMES if architecture == "gpt2" else _GLOBAL_NAMES).get(stem)
    return hf and f"{hf}.{kind}"


def _rotary_rows(size: int, heads: int) -> np.ndarray:
    """For each Hugging Face row of q or k, its row in GGUF.

    Rotary pairs are the two halves of a head in Hugging Face's layout and neighbours in llama.cpp's.
    """
    return np.arange(size).reshape(heads, size // heads // 2, 2).swapaxes(1, 2).reshape(-1)
