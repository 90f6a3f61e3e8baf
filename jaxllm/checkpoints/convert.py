"""Any checkpoint that jaxllm reads, written as a Hugging Face folder that transformers, vLLM and jaxllm load."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.gguf_source import GGUFSource
from jaxllm.checkpoints.resolve import resolve_model
from jaxllm.checkpoints.source import TensorSource, open_checkpoint
from jaxllm.checkpoints.writer import check_target, write_safetensors
from jaxllm.errors import CheckpointError, ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# What a Hugging Face folder holds besides weights: it goes with the model as it stands.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
)
_CLASSES = {  # config.json's `architectures`, which some exports lack and vLLM needs
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def convert(model: str | os.PathLike, out: str | os.PathLike, *, dtype: Dtype | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Writes `model` (a folder, a `.gguf` file, a hub name or `demo`) as config.json, safetensors and tokenizer files in the folder `out`.

    Float tensors are cast to `dtype`; None keeps what is stored, and makes a quantised GGUF bfloat16. One tensor is converted at a time.
    Returns path, model_type, dtype (of most values), tensors, bytes and files (names of all that was written).
    Raises ConfigError for an unknown dtype and CheckpointError for a model that jaxllm could not load, NaN and infinity included (also
    those that the cast would make), or a folder in the way; then nothing is written.
    """
    from jaxllm.checkpoints.load import check_names

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be {', '.join(DTYPES)} or None, not {dtype!r}")
    check_target(out, overwrite)
    path = resolve_model(model)
    source = open_checkpoint(path)
    check_names(source)
    if dtype is None and isinstance(source, GGUFSource) and source.quantized:
        dtype = "bfloat16"
    stored, values = {name: info.dtype_name for name, info in source.tensors.items()}, Counter()
    for name, info in source.tensors.items():
        values[_target(stored[name], dtype)] += int(np.prod(info.shape))
    most = values.most_common(1)[0][0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_safetensors(
            out,
            _tensors(source, dtype),
            hf_config(source.config, most),
            overwrite=overwrite,
            copy_files=companions(path, source, Path(scratch)),
        )
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    files = sorted(file.name for file in folder.iterdir())
    report = {"path": str(folder), "model_type": source.config["model_type"], "dtype": most, "tensors": len(source.tensors)}
    return report | {"bytes": weights, "files": files}


def _target(stored: str, dtype: str | None) -> str:
    """The dtype that a tensor is written in: integers and booleans stay what they are."""
    return dtype if dtype is not None and stored in ("float64", *DTYPES) else stored


def _tensors(source: TensorSource, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    from jaxllm.checkpoints.load import all_finite

    for name, info in source.tensors.items():
        x = source.read(name)
        if (target := _target(info.dtype_name, dtype)) != info.dtype_name:
            with np.errstate(over="ignore"):  # an overflow is found below, and named
                x = x.astype(DTYPES[target])
        if not all_finite(x):
            raise CheckpointError(
                f"{source.path}: NaN or infinity in {name} (as {target}). Get the checkpoint again, or choose a dtype that holds its values"
            )
        yield name, x


def hf_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json that says what the tensors are, under the key that it used: transformers 5 calls it `dtype`, older ones `torch_dtype`."""
    out = {"architectures": [_class(config["model_type"])], **config}
    keys = [key for key in ("dtype", "torch_dtype") if key in out] or ["torch_dtype"]
    out |= dict.fromkeys(keys, dtype)
    for name, section in out.items():  # of multimodal models: text_config, vision_config
        if isinstance(section, Mapping) and (inner := [key for key in ("dtype", "torch_dtype") if key in section]):
            out[name] = {**section, **dict.fromkeys(inner, dtype)}
    return out


def classifier_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that make a decoder's one a classifier's with one label: a reward model's."""
    name = _class(config["model_type"]).split("For")[0].removesuffix("LMHeadModel")
    name = "Gemma3Text" if config["model_type"] == "gemma3_text" else name
    return {"architectures": [f"{name}ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _class(model_type: str) -> str:
    return _CLASSES.get(model_type, f"{model_type.capitalize()}ForCausalLM")


def companions(path: Path, source: TensorSource, scratch: Path) -> list[Path]:
    """The files to put beside the weights: those of a folder as they are, or made in `scratch` from what a GGUF file says."""
    folder = path if path.is_dir() else None
    found = [folder / name for name in _COMPANIONS if (folder / name).exists()] if folder else []
    if not isinstance(source, GGUFSource):
        return found
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in found) and source.has_tokenizer:
        from jaxllm.tokenizers import load_tokenizer, save_tokenizer

        save_tokenizer(load_tokenizer(source.path), scratch)
    if not any(file.name == "generation_config.json" for file in found):
        ids = {key: source.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if source.config.get(key) is not None}
        file = scratch / "generation_config.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(ids | known, indent=2) + "\n", encoding="utf-8")
    return found + sorted(scratch.iterdir())
