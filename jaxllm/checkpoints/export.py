"""A decoder's parameters as a Hugging Face folder: what `load_model` does, the other way round."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from jaxllm.checkpoints.convert import DTYPES, Dtype, classifier_config, companions, hf_config
from jaxllm.checkpoints.load import layers_of, weight_names
from jaxllm.checkpoints.source import open_checkpoint
from jaxllm.checkpoints.writer import check_target, write_safetensors
from jaxllm.models import ModelConfig, family_of
from jaxllm.models.families import Weight


def export_model(
    config: ModelConfig,
    params: nnx.State,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike,
    dtype: Dtype = "bfloat16",
    overwrite: bool = False,
    classifier: bool = False,
    pad_token_id: int | None = None,
) -> Path:
    """Writes the parameters of a decoder, stacked or not, as safetensors beside the configuration, tokenizer and generation
    settings of the checkpoint `base` that it was made from; what `base` holds besides a decoder (a vision tower, say) goes along
    as it is. `classifier`: with the `score` of a reward model in place of the output layer, as transformers' ForSequenceClassification;
    `pad_token_id` is the token that it never scores. One tensor (or one stack of layers) is on the host at a time. Raises CheckpointError
    for a folder in the way."""
    check_target(out, overwrite)
    source = open_checkpoint(Path(base))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        written = set()
        for name, x in hf_tensors(config, params, weight_names(source, config)):
            written.add(name)
            yield name, np.asarray(x, DTYPES[dtype])
        for name in source.tensors:
            # Some checkpoints keep a copy of tied embeddings.
            if name not in written and not (name.endswith("lm_head.weight") and (config.tie_embeddings or classifier)):
                yield name, source.read(name)

    with tempfile.TemporaryDirectory() as scratch:
        files = companions(Path(base), source, Path(scratch))
        values = hf_config(source.config, dtype)
        if classifier:
            values |= classifier_config(values) | {"pad_token_id": pad_token_id}
        return write_safetensors(out, tensors(), values, overwrite=overwrite, copy_files=files)


def hf_tensors(config: ModelConfig, params: nnx.State, names: Mapping[str, Weight] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the decoder, named and shaped as `names` say, or as the family's are."""
    names = family_of(config.family).weights(config) if names is None else names
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}  # of tensors that hold several parameters
    ends: dict[str, int] = {}
    for w in names.values():
        if w.part is not None:
            ends[w.name] = max(ends.get(w.name, 0), w.part[1])
    flat = nnx.to_flat_state(params)
    scanned = any(path[0] == "blocks" for path, _ in flat)
    for path, variable in flat:
        if path == ("score", "weight"):  # a reward model's, which every family calls so
            yield "score.weight", np.asarray(variable[...])
            continue
        key, layers = layers_of(path, config, scanned)
        weight, value = names[key], np.asarray(variable[...])
        for layer, x in zip(layers, value if path[0] == "blocks" else [value], strict=True):
            x = x.T if weight.kind == "conv1d" else x
            name = weight.name.format(i=layer)
            if weight.part is None:
                yield name, x
                continue
            held = parts.setdefault(name, [])
            held.append((weight.part[0], x))
            axis = -1 if weight.kind == "conv1d" else 0
            if sum(x.shape[axis] for _, x in held) == ends[weight.name]:
                yield name, np.concatenate([x for _, x in sorted(parts.pop(name), key=lambda p: p[0])], axis=axis)
    assert not parts, f"incomplete: {', '.join(parts)}"
