"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.adapters.attach import add_adapter, merge_adapter
from jaxllm.adapters.config import AdapterConfig, LoraConfig, PrefixTuningConfig, config_from_peft, config_to_peft
from jaxllm.adapters.layers import IA3, FusedAdapted
from jaxllm.adapters.targets import at, hf_weights, layers_at, pattern_value, resolve_targets, targeted
from jaxllm.checkpoints.load import Model, all_finite
from jaxllm.checkpoints.safetensors_source import read_file
from jaxllm.checkpoints.writer import check_target, whole_folder, write_file
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models import Decoder, family_of

logger = logging.getLogger(__name__)

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Slot:
    """Where one tensor of a file lies: all of a variable, or a part of it (of one layer in a stack, of the ranks in use)."""

    name: str
    holder: nnx.Module
    attribute: str
    index: tuple
    shape: tuple[int, ...]  # in the file
    transposed: bool = False
    optional: bool = False  # not missed in a file

    @property
    def variable(self) -> nnx.Variable:
        return getattr(self.holder, self.attribute)


def save_adapter(
    model: Decoder, config: AdapterConfig, folder: str | os.PathLike, *, base_model: str | None = None, overwrite: bool = False, dtype=None
) -> Path:
    """Writes the adapter of `model`, made by `add_adapter(..., config)`, as PEFT's `save_pretrained` does; returns the folder.

    `base_model` is what the file names as its base (None: what `config` names). Tensors keep their dtype unless `dtype` is given.
    The folder appears whole or not at all. Raises CheckpointError for a non-empty folder (unless `overwrite`, which replaces an
    adapter and nothing else).
    """
    folder = check_target(folder, overwrite, what="adapter", marker=CONFIG_NAME)
    tensors = adapter_tensors(model, config, dtype=dtype)
    with whole_folder(folder) as staging:
        values = config_to_peft(config, **_derived(model, config))
        if base_model is not None:
            values["base_model_name_or_path"] = base_model
        (staging / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
        write_file(staging / WEIGHTS_NAME, tensors)
    return folder


def adapter_tensors(model: Decoder, config: AdapterConfig, *, dtype=None) -> dict[str, np.ndarray]:
    """The adapter's tensors under PEFT's names, on the host."""
    host: dict[int, np.ndarray] = {}
    out = {}
    for slot in _slots(model, config):
        value = host.setdefault(id(slot.variable), np.asarray(jax.device_get(slot.variable[...])))[slot.index]
        value = (value.T if slot.transposed else value).reshape(slot.shape)
        out[slot.name] = np.ascontiguousarray(value if dtype is None else value.astype(dtype))
    return out


def load_adapter(
    model: Decoder, folder: str | os.PathLike, *, base_model: str | None = None, dtype=jnp.float32
) -> tuple[Decoder, AdapterConfig]:
    """The model with the adapter of a PEFT folder on it, its weights in `dtype`, and the adapter's configuration.

    With `base_model` given, a folder that names another base is warned about. Raises CheckpointError for what is not implemented, and
    one that lists every tensor that is missing, unknown, misshapen or not finite.
    """
    folder = Path(folder).expanduser()
    config, tensors = read_adapter_config(folder, scored=getattr(model, "score", None) is not None), _read_tensors(folder)
    named = config.base_model_name_or_path
    if base_model and named and Path(named).name != Path(base_model).name:
        logger.warning("the adapter %s was trained on %s, and goes on %s here", folder, named, base_model)
    try:
        model = add_adapter(model, config, rngs=nnx.Rngs(0), dtype=dtype)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    set_tensors(model, config, tensors, str(folder))
    return model, config


def set_tensors(model: Decoder, config: AdapterConfig, tensors: Mapping[str, np.ndarray], where: str = "adapter") -> None:
    """Puts tensors with PEFT's names into a model that has the adapter. Raises CheckpointError as `load_adapter`."""
    for old, new in getattr(family_of(model.config.family), "ALTERNATIVE_PREFIXES", {}).items():
        tensors = {_PREFIX + new + n.removeprefix(_PREFIX + old) if n.startswith(_PREFIX + old) else n: t for n, t in tensors.items()}
    slots = list(_slots(model, config))
    problems = [f"{slot.name} is missing" for slot in slots if slot.name not in tensors and not slot.optional]
    expected = {slot.name for slot in slots}
    problems += [f"{name} matches nothing in this adapter of a {model.config.family} model" for name in tensors if name not in expected]
    for slot in slots:
        if (tensor := tensors.get(slot.name)) is None:
            continue
        if tensor.shape != slot.shape:
            problems.append(f"{slot.name} has shape {list(tensor.shape)}, and the model makes it {list(slot.shape)}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{slot.name} is of type {tensor.dtype}, and adapters are of floating point")
        elif not all_finite(np.ascontiguousarray(tensor)):
            problems.append(f"{slot.name} has NaN or infinity in it")
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{where} does not fit the model and its own configuration: {'; '.join(problems[:12])}{more}")
    host: dict[tuple[int, str], tuple[_Slot, np.ndarray]] = {}
    for slot in (slot for slot in slots if slot.name in tensors):
        key = (id(slot.holder), slot.attribute)
        if key not in host:
            host[key] = slot, np.zeros(slot.variable.shape, slot.variable.dtype)
        value = host[key][1]
        tensor = tensors[slot.name].astype(value.dtype)
        value[slot.index] = (tensor.T if slot.transposed else tensor).reshape(value[slot.index].shape)
    for slot, value in host.values():
        setattr(slot.holder, slot.attribute, slot.variable.replace(jax.device_put(value, slot.variable[...].sharding)))


def read_adapter_config(folder: str | os.PathLike, *, scored: bool = False) -> AdapterConfig:
    """The configuration in a PEFT folder; `scored`: of a reward model. Raises CheckpointError; see `config_from_peft`."""
    file = Path(folder).expanduser() / CONFIG_NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no adapter: {CONFIG_NAME} is missing. Name the folder that PEFT or save_adapter wrote"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a JSON {type(values).__name__} where an object is expected")
    if scored and values.get("task_type") == "SEQ_CLS":  # the score is there anyhow: it belongs to the model
        saved = [name for name in values.get("modules_to_save") or () if name not in ("score", "classifier")]
        values |= {"task_type": None, "modules_to_save": saved or None}
    return config_from_peft(values, str(file))


def merge_into(model: Model, folder: str | os.PathLike, *, base_model: str | None = None) -> Model:
    """A model whose weights have the adapter of a PEFT folder in them, placed and typed as they were.

    Raises CheckpointError as `load_adapter`, and ConfigError for an adapter that cannot be merged (prompt and prefix tuning).
    """
    config = read_adapter_config(folder)
    if config.peft_type not in ("LORA", "IA3"):
        raise ConfigError(
            f"{folder}: a {config.peft_type} adapter adds tokens, not weights, and is not implemented for serving: train a LoRA"
        )
    adapted, _ = load_adapter(nnx.merge(model.graph, model.params), folder, base_model=base_model)
    merged = dict(nnx.to_flat_state(nnx.split(merge_adapter(adapted), graph=False)[1]))
    same: Callable[[tuple, Any], Any] = lambda path, old: old.replace(jax.device_put(merged[path][...], old[...].sharding))
    params = [(path, same(path, old)) for path, old in nnx.to_flat_state(model.params)]
    return Model(model.config, model.graph, nnx.from_flat_state(params), model.scanned)


def _slots(model: Decoder, config: AdapterConfig) -> Iterator[_Slot]:
    if model.virtual is not None:
        yield _Slot("prompt_embeddings", model.virtual, "prompt_embeddings", (), tuple(model.virtual.prompt_embeddings.shape))
        return
    for site, which in targeted(model, config):
        owner = at(model, site.owner)
        if not site.fused:
            owner = owner.base if isinstance(owner, FusedAdapted) else owner
            owner = getattr(owner, site.parts[0])
        adapter = getattr(owner, "adapter", None)
        if adapter is None:
            raise ConfigError(f"the model has no adapter on {site.names[0]}, which the configuration names: give the one it was made with")
        for layer, (name, on) in enumerate(zip(site.names, which, strict=True)):
            if on:
                yield from _of_one(f"{_PREFIX}{name}", config, name, adapter, (layer,) if site.stacked else ())
        if site.parts == ("lm_head",):  # PEFT saves an adapted output layer's own weights too
            yield _Slot(f"{_PREFIX}lm_head.base_layer.weight", owner.base, "weight", (), tuple(owner.base.weight.shape), optional=True)
    yield from _saved_slots(model)


def _of_one(prefix: str, config: AdapterConfig, name: str, adapter: nnx.Module, at_layer: tuple) -> Iterator[_Slot]:
    if isinstance(adapter, IA3):
        n = adapter.ia3_l.shape[-1]
        yield _Slot(f"{prefix}.ia3_l", adapter, "ia3_l", at_layer, (1, n) if adapter.feedforward else (n, 1))
        return
    assert isinstance(config, LoraConfig)
    r = pattern_value(config.rank_pattern, name, config.r)
    n_in, n_out = adapter.lora_A.shape[-1], adapter.lora_B.shape[-2]
    yield _Slot(f"{prefix}.lora_A.weight", adapter, "lora_A", (*at_layer, slice(r)), (r, n_in))
    yield _Slot(f"{prefix}.lora_B.weight", adapter, "lora_B", (*at_layer, slice(None), slice(r)), (n_out, r))
    if adapter.magnitude is not None:
        yield _Slot(f"{prefix}.lora_magnitude_vector", adapter, "magnitude", at_layer, (n_out,))


def _saved_slots(model: Decoder) -> Iterator[_Slot]:
    if (score := getattr(model, "score", None)) is not None:
        yield _Slot(f"{_PREFIX}score.weight", score, "weight", (), tuple(score.weight.shape))
    if (saved := getattr(model, "saved_modules", None)) is None:
        return
    weights, scanned = hf_weights(model.config), bool(model.blocks)
    for path in saved.paths:
        layers = layers_at(model.config, path, scanned)
        weight = weights[".".join(map(str, ("layers", "{i}", *path[2:]))) if layers else ".".join(map(str, path))]
        holder = at(model, path[:3])
        holder = at(holder.base, path[3:-1]) if isinstance(holder, FusedAdapted) else at(model, path[:-1])
        stacked, transposed = path[0] == "blocks", weight.kind == "conv1d"
        shape = tuple(getattr(holder, path[-1]).shape)[1 if stacked else 0 :]
        for i, layer in enumerate(layers or (0,)):
            name = _PREFIX + weight.name.format(i=layer)
            yield _Slot(name, holder, path[-1], (i,) if stacked else (), shape[::-1] if transposed else shape, transposed)


def _derived(model: Decoder, config: AdapterConfig) -> dict[str, Any]:
    """What PEFT writes that follows from the model."""
    c = model.config
    if model.virtual is not None:
        prefix = isinstance(config, PrefixTuningConfig)
        heads = c.num_kv_heads if prefix else c.num_heads
        width = heads * c.head_dim if prefix else c.hidden_size
        out = {"token_dim": width, "num_attention_heads": heads, "num_layers": c.num_layers, "num_transformer_submodules": 1}
        return out | ({"encoder_hidden_size": width} if prefix else {})
    out = {"target_modules": resolve_targets(c, config)}
    conv1d = any(weight.kind == "conv1d" for weight in hf_weights(c).values())
    if getattr(model, "score", None) is not None:
        out |= {"task_type": "SEQ_CLS", "modules_to_save": (*(config.modules_to_save or ()), "score")}
    return out | {"fan_in_fan_out": conv1d}


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS_NAME
    if not file.exists():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code: save it again as safetensors)"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME}{pickled}")
    return read_file(file)
