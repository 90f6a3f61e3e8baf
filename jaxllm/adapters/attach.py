"""Putting an adapter on a model, taking it off, and merging it into the weights. Every function leaves the model it is given alone."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.adapters.config import AdapterConfig, IA3Config, LoraConfig
from jaxllm.adapters.layers import IA3, Adapted, FusedAdapted, Lora
from jaxllm.adapters.quantize import QuantizedLinear, dequantized, shape_of, weight_of
from jaxllm.adapters.targets import Site, at, hf_weights, is_feedforward, layers_at, pattern_value, targeted
from jaxllm.adapters.variables import AdapterConstant, AdapterParam, SavedParam
from jaxllm.adapters.virtual import VirtualTokens
from jaxllm.errors import ConfigError
from jaxllm.models import Decoder
from jaxllm.models.layers import Linear


def add_adapter(model: Decoder, config: AdapterConfig, *, rngs: nnx.Rngs, dtype=jnp.float32) -> Decoder:
    """The model with a new adapter on it; the base weights are shared with the model given. Adapter weights have `dtype`.

        model = add_adapter(model, LoraConfig(r=16, target_modules="all-linear"), rngs=nnx.Rngs(0))
        graph, trainable, frozen = nnx.split(model, is_trainable, ..., graph=False)

    Raises ConfigError for targets that fit nothing and for what this model cannot have; a model has one adapter at most.
    """
    if has_adapter(model):
        raise ConfigError("this model has an adapter already: merge it (merge_adapter), or start from the base model")
    model = _copy(model)
    if not isinstance(config, (LoraConfig, IA3Config)):
        model.virtual = nnx.data(VirtualTokens(model.config, config, model.embed_tokens, rngs=rngs, dtype=dtype))
        return _beside_the_base(model)
    chosen = targeted(model, config)
    _save_modules(model, config)
    for site, which in chosen:
        owner = _unwrapped(at(model, site.owner))
        linears = [getattr(owner, part) for part in site.parts]
        adapter = _make(model, config, site, which, linears, rngs, dtype)
        if not site.fused:
            setattr(owner, site.parts[0], Adapted(linears[0], adapter))
        else:
            setattr(at(model, site.owner[:-1]), site.owner[-1], FusedAdapted(at(model, site.owner), adapter, site.parts, site.rows))
    return _beside_the_base(model)


def _beside_the_base(model: Decoder) -> Decoder:
    """The model with what the adapter brought on all the devices that its base is on: it is small, so each has it whole."""
    base = model.embed_tokens[...]
    sharding = None if isinstance(base, jax.core.Tracer) else getattr(base, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return model
    whole, devices = NamedSharding(sharding.mesh, PartitionSpec()), sharding.device_set
    graph, state = nnx.split(model, graph=False)

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        return variable if value.sharding.device_set == devices else variable.replace(jax.device_put(value, whole))

    return nnx.merge(graph, jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _make(model: Decoder, config, site: Site, which: tuple[bool, ...], linears: list, rngs: nnx.Rngs, dtype) -> Lora | IA3:
    axes_out, axes_in = linears[0].axes if isinstance(linears[0], QuantizedLinear) else linears[0].weight.logical_axes
    axes = (axes_in, None if site.fused else axes_out)  # parts of a fused matrix have axes of their own: it stays whole
    n_in, n_out = shape_of(linears[0])[1], sum(shape_of(linear)[0] for linear in linears)
    if isinstance(config, IA3Config):
        forward = {is_feedforward(model.config, config, name) for name, on in zip(site.names, which, strict=True) if on}
        if len(forward) > 1:
            raise ConfigError("IA3: feedforward_modules differ between layers that run as one stack: load with scan_layers=False")
        return IA3(n_in, n_out, axes, which, feedforward=forward.pop(), stacked=site.stacked, dtype=dtype)
    ranks = [pattern_value(config.rank_pattern, name, config.r) if on else 0 for name, on in zip(site.names, which, strict=True)]
    alphas = [pattern_value(config.alpha_pattern, name, config.lora_alpha) for name in site.names]
    scalings = [config.scaling(r, alpha) if r else 0.0 for r, alpha in zip(ranks, alphas, strict=True)]
    options = dict(stacked=site.stacked, dropout=config.lora_dropout, init=config.init_lora_weights, rngs=rngs, dtype=dtype)
    lora = Lora(n_in, n_out, axes, ranks, scalings, **options)
    if config.use_dora:
        lora.start_dora(jnp.concatenate([weight_of(linear) for linear in linears], axis=-2), axes)
    return lora


def _save_modules(model: Decoder, config: AdapterConfig) -> None:
    """Makes the parameters of `modules_to_save` trainable, and keeps what they were, for `adapter_disabled`."""
    wanted = config.modules_to_save or ()
    if not wanted:
        return
    weights, scanned = hf_weights(model.config), bool(model.blocks)
    paths, originals, used = [], [], set()
    for path, variable in nnx.to_flat_state(nnx.split(model, graph=False)[1]):
        layers = layers_at(model.config, path, scanned)
        weight = weights.get(".".join(map(str, ("layers", "{i}", *path[2:]))) if layers else ".".join(map(str, path)))
        if weight is None:
            continue
        names = [weight.name.format(i=i) for i in layers] or [weight.name]
        found = [_module_to_save(name, wanted) for name in names]
        if not any(found):
            continue
        if not all(found):
            raise ConfigError(f"modules_to_save: only some of {names[0]} ... run as one stack: load with scan_layers=False")
        if weight.part is not None:
            raise ConfigError(f"modules_to_save: {names[0]} is a fused matrix, which cannot be saved whole: adapt it with LoRA")
        if path[0] in ("embed_tokens", "lm_head") and model.config.tie_embeddings:
            raise ConfigError(f"modules_to_save: {found[0]} is tied to the output (tie_word_embeddings), which is not implemented")
        used.update(found)
        owner, last = at(model, path[:-1]), path[-1]
        setattr(owner, last, SavedParam(variable[...], logical_axes=variable.logical_axes))
        paths.append(path)
        originals.append(AdapterConstant(variable[...], logical_axes=variable.logical_axes))
    if missed := [m for m in wanted if m not in used]:
        tied = " (this model's lm_head is its embedding)" if "lm_head" in missed and model.config.tie_embeddings else ""
        raise ConfigError(f"modules_to_save: {', '.join(missed)} fits no module of this model{tied}")
    model.saved_modules = _Saved(tuple(paths), originals)


class _Saved(nnx.Module):
    def __init__(self, paths: tuple[tuple, ...], originals: list[AdapterConstant]):
        self.paths, self.originals = paths, nnx.List(originals)


def _module_to_save(tensor: str, wanted: tuple[str, ...]) -> str | None:
    """Which of `wanted` names the module that holds the tensor, or one around it: PEFT goes by the ends of names."""
    steps = tensor.split(".")[:-1]
    around = [".".join(steps[: i + 1]) for i in range(len(steps))]
    return next((w for w in wanted if any(re.search(rf"(^|.){re.escape(w)}$", name) for name in around)), None)


def is_trainable(path: tuple, variable: nnx.Variable) -> bool:
    """Whether training changes the variable of a model with an adapter; a filter for `nnx.split`."""
    return isinstance(variable, (AdapterParam, SavedParam))


def has_adapter(model: Decoder) -> bool:
    return model.virtual is not None or getattr(model, "saved_modules", None) is not None or next(wrappers(model), None) is not None


def wrappers(model: Decoder) -> Iterator[tuple[nnx.Module, str | int, Adapted | FusedAdapted, tuple]]:
    """Each adapted module: who holds it, under which attribute, itself, and the path of the Linear's owner in a bare model."""
    owners = [(kind, i, part) for kind in ("blocks", "layers") for i in range(len(getattr(model, kind))) for part in ("self_attn", "mlp")]
    for owner in owners:
        holder = at(model, owner[:-1])
        if isinstance(fused := getattr(holder, owner[-1]), FusedAdapted):
            yield holder, owner[-1], fused, owner
        inner = _unwrapped(fused)
        for name, value in list(vars(inner).items()):
            if isinstance(value, Adapted):
                yield inner, name, value, owner
    for name in ("project_in", "project_out", "lm_head"):
        if isinstance(value := getattr(model, name), Adapted):
            yield model, name, value, ()


def adapter_disabled(model: Decoder) -> Decoder:
    """The base model under an adapter, as it was before it: what a reference policy computes. Costs no memory; may be called in jit."""
    model = _copy(model)
    for holder, name, wrapper, _ in list(wrappers(model)):
        if wrapper.merged:
            raise ConfigError("the adapter is merged into the weights: unmerge_adapter first")
        setattr(holder, name, wrapper.base)
    # An Adapted inside a FusedAdapted was replaced in its base, which now stands in the fused one's place.
    if (saved := getattr(model, "saved_modules", None)) is not None:
        for path, original in zip(saved.paths, saved.originals, strict=True):
            setattr(at(model, path[:-1]), path[-1], nnx.Param(original[...], logical_axes=original.logical_axes))
        del model.saved_modules
    model.virtual = nnx.static(None)
    return model


def with_dropout(model: Decoder, key: jax.Array) -> Decoder:
    """The model as it trains: with dropout before LoRA's A, drawn from `key`. Call it in the loss, with each step's key.

    Without it there is no dropout, which is right for evaluation and serving.
    """
    model = _copy(model)
    for i, (_, _, wrapper, owner) in enumerate(list(wrappers(model))):
        if getattr(wrapper.adapter, "dropout", 0):
            its_key = jax.random.fold_in(key, i)
            if owner and owner[0] == "blocks":
                its_key = jax.random.split(its_key, wrapper.adapter.lora_A.shape[0])
            wrapper.adapter.key = nnx.data(AdapterConstant(its_key, logical_axes=()))
    return model


def merge_adapter(model: Decoder, *, unload: bool = True, dtype=None) -> Decoder:
    """The model with its adapter in the weights: as fast as the base. A quantised base becomes one of `dtype` (None: bfloat16).

    With `unload` the adapter is gone and the result is a plain Decoder; without, it stays beside the weights and
    `unmerge_adapter` takes it out again. Raises ConfigError for prompt and prefix tuning, which have nothing to merge.
    """
    if model.virtual is not None:
        raise ConfigError("prompt and prefix tuning add tokens, not weights: there is nothing to merge")
    model = _copy(model)
    if any(isinstance(linear, QuantizedLinear) for _, linear in _linears(model)):
        if not unload:
            raise ConfigError("an adapter merged into a quantised base cannot be taken out again: merge with unload=True")
        _replace_linears(
            model, lambda linear: dequantized(linear, dtype or jnp.bfloat16) if isinstance(linear, QuantizedLinear) else linear
        )
    for holder, name, wrapper, _ in list(wrappers(model)):
        if not wrapper.merged:
            _apply(wrapper, undo=False)
        if unload:
            setattr(holder, name, wrapper.base)
    if unload and (saved := getattr(model, "saved_modules", None)) is not None:
        for path in saved.paths:
            variable = getattr(at(model, path[:-1]), path[-1])
            setattr(at(model, path[:-1]), path[-1], nnx.Param(variable[...], logical_axes=variable.logical_axes))
        del model.saved_modules
    return model


def unmerge_adapter(model: Decoder) -> Decoder:
    """Undoes `merge_adapter(model, unload=False)`: the base weights are the original ones to the precision of their dtype."""
    model = _copy(model)
    found = list(wrappers(model))
    if not found or not all(wrapper.merged for _, _, wrapper, _ in found):
        raise ConfigError("there is no merged adapter in this model: merge it with merge_adapter(model, unload=False)")
    for _, _, wrapper, _ in found:
        _apply(wrapper, undo=True)
    return model


def _apply(wrapper: Adapted | FusedAdapted, *, undo: bool) -> None:
    fused = isinstance(wrapper, FusedAdapted)
    base, adapter = wrapper.base, wrapper.adapter
    linears = [getattr(base, part) for part in wrapper.parts] if fused else [base]
    rows = [slice(*r) for r in wrapper.rows] if fused else [slice(None)]
    if not undo:
        adapter.keep_norm(jnp.concatenate([weight_of(linear) for linear in linears], axis=-2))
    change = adapter.unmerge if undo else adapter.merge
    for linear, part in zip(linears, rows, strict=True):
        bias = None if linear.bias is None else linear.bias[...]
        weight, bias = change(linear.weight[...], bias, part)
        linear.weight = _like(linear.weight, weight)
        if bias is not None:
            linear.bias = _like(linear.bias, bias)
    wrapper.merged = not undo
    if undo and isinstance(adapter, Lora):
        adapter.weight_norm = nnx.static(None)


def _like(variable: nnx.Variable, value: jax.Array) -> nnx.Variable:
    """A variable of the same kind, its value placed as the old one was."""
    old = variable[...]
    if isinstance(old, jax.core.Tracer) or isinstance(value, jax.core.Tracer):
        return variable.replace(value)
    return variable.replace(jax.device_put(value, old.sharding))


def _linears(model: Decoder) -> Iterator[tuple[tuple, nnx.Module]]:
    """Every linear module that stands free or under an adapter."""
    owners = [at(model, (kind, i)) for kind in ("blocks", "layers") for i in range(len(getattr(model, kind)))]
    for owner in [_unwrapped(getattr(layer, part)) for layer in owners for part in ("self_attn", "mlp")] + [model]:
        for name, value in list(vars(owner).items()):
            holder, attribute = (value, "base") if isinstance(value, Adapted) else (owner, name)
            linear = value.base if isinstance(value, Adapted) else value
            if isinstance(linear, (Linear, QuantizedLinear)):
                yield (holder, attribute), linear


def _replace_linears(model: Decoder, change) -> None:
    for (holder, name), linear in list(_linears(model)):
        setattr(holder, name, change(linear))


def _unwrapped(module: nnx.Module) -> nnx.Module:
    while isinstance(module, FusedAdapted):
        module = module.base
    return module


def _copy(model: Decoder) -> Decoder:
    """Modules of its own, the variables shared: those are replaced, never written to."""
    return nnx.merge(*nnx.split(model, graph=False))
