"""The model that a run trains, as its configuration has it: quantised, adapted, with a score, beside its reference."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.adapters import AdapterConfig, adapter_disabled, add_adapter, is_trainable, quantize_base, save_adapter
from jaxllm.checkpoints.export import export_model
from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.source import TensorSource
from jaxllm.errors import ConfigError
from jaxllm.models import Decoder
from jaxllm.sharding import ShardingRules
from jaxllm.tokenizers import Tokenizer
from jaxllm.training.backend import Backend
from jaxllm.training.config import TrainConfig
from jaxllm.training.objectives import Objective, add_score, make_objective, reference_log_probs, without_head

_SCORE = "score"


def trained_model(config: TrainConfig, source: TensorSource, tokenizer: Tokenizer, mesh: Mesh, rules: ShardingRules) -> Decoder:
    """The decoder of a run before its first step."""
    loaded = load_model(source, dtype=stored_dtype(config), mesh=mesh, rules=rules, scan_layers=True)
    decoder = nnx.merge(loaded.graph, loaded.params)
    del loaded
    return prepared(decoder, config, pad_token_id(source, tokenizer))


def stored_dtype(config: TrainConfig) -> Any:
    """Of a model's parameters: what is trained is kept in float32, unless that is not wanted; what is not trained needs no more than it
    computes with."""
    wide = config.precision == "float32" or (config.precision == "bfloat16_mixed" and config.adapter is None)
    return jnp.float32 if wide else jnp.bfloat16


def prepared(decoder: Decoder, config: TrainConfig, pad_token_id: int | None = None) -> Decoder:
    """A decoder of `stored_dtype` as the run trains it; of arrays, or, under `nnx.eval_shape`, of shapes."""
    c, rngs = config, nnx.Rngs(params=config.seed)
    if c.objective.name == "reward":
        decoder = without_head(decoder)
    if c.quantize_base is not None:
        decoder = quantize_base(decoder, c.quantize_base)
    if c.adapter is not None:
        decoder = add_adapter(decoder, _without_score(c), rngs=rngs)
    if c.objective.name == "reward":
        decoder = add_score(decoder, pad_token_id=pad_token_id, saved=c.adapter is not None, rngs=rngs)
    if c.objective.needs_reference and c.adapter is None:
        decoder = _beside_reference(decoder, jnp.float32 if c.precision == "float32" else jnp.bfloat16)
    decoder.remat = None if c.remat == "none" else c.remat
    return decoder


def trains(config: TrainConfig) -> Callable[[tuple, nnx.Variable], bool]:
    """The filter that tells which of the decoder's variables the run changes."""
    if config.adapter is not None:
        return is_trainable
    return lambda path, variable: isinstance(variable, nnx.Param) and path[0] != "reference"


def objective_of(config: TrainConfig, backend: Backend) -> Objective:
    """The objective; where it compares with the model as it was, that is the one without its adapter, or the copy beside it."""
    objective = make_objective(config.objective, backend)
    if not config.objective.needs_reference:
        return objective

    def with_reference(model, batch, key):
        reference = adapter_disabled(model) if config.adapter is not None else model.reference
        batch = jax.lax.stop_gradient(reference_log_probs(reference, batch, backend))
        return objective(without_reference(model), batch, key)

    return with_reference


def export(config: TrainConfig, model: Decoder, source: TensorSource, tokenizer: Tokenizer, base: Path, out: Path) -> Path:
    """Writes the adapter of a decoder in PEFT's format, or the decoder as a Hugging Face folder beside the files of its `base`."""
    if config.adapter is not None:
        return save_adapter(model, _without_score(config), out, base_model=config.model, overwrite=True)
    params = nnx.split(without_reference(model), graph=False)[1]
    options: dict[str, Any] = {"dtype": config.export_dtype, "overwrite": True}
    if config.objective.name == "reward":
        options |= {"classifier": True, "pad_token_id": pad_token_id(source, tokenizer)}
    return export_model(model.config, params, out, base=base, **options)


def pad_token_id(source: TensorSource, tokenizer: Tokenizer) -> int | None:
    """The token that transformers' classifiers pass over: config.json's, or else the tokenizer's."""
    named = source.config.get("pad_token_id")
    return tokenizer.pad_token_id if named is None else named


def without_reference(model: Decoder) -> Decoder:
    if getattr(model, "reference", None) is None:
        return model
    model = nnx.merge(*nnx.split(model, graph=False))
    del model.reference
    return model


def _beside_reference(model: Decoder, dtype: Any) -> Decoder:
    """The decoder with a frozen copy of itself. In bfloat16 that is 2 bytes a parameter beside the 16 that training keeps of it (its
    weights, gradients and two moments): less than a run needs for activations, and right for any data, order and evaluation, where
    log-probabilities computed beforehand would be tied to one."""
    graph, state = nnx.split(model, graph=False)
    model = nnx.merge(graph, state)
    model.reference = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), state))
    return model


def _without_score(config: TrainConfig) -> AdapterConfig:
    """The adapter as it lies on the decoder: a score is saved with it anyhow, whether or not modules_to_save names it, as by PEFT."""
    adapter, named = config.adapter, getattr(config.adapter, "modules_to_save", None) or ()
    if config.objective.name != "reward" or _SCORE not in named:
        return adapter
    return replace(adapter, modules_to_save=tuple(name for name in named if name != _SCORE) or None)


def check_reward(config: TrainConfig, model_type: str) -> None:
    """Raises ConfigError for models that a score cannot be exported of."""
    if config.objective.name == "reward" and model_type == "gemma3":
        raise ConfigError("reward: the classifier of multimodal models (gemma3) is not implemented: take the text model (gemma3_text)")
