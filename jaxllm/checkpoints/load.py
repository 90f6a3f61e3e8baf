"""From a checkpoint's tensors to a model's parameters: each read once, into its own dtype, straight into its shards."""

import fnmatch
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.checkpoints.source import TensorSource
from jaxllm.errors import CheckpointError
from jaxllm.models import Decoder, ModelConfig, config_from_hf, family_of
from jaxllm.models.families import Weight
from jaxllm.sharding import ShardingRules, named_sharding

_PIECE_VALUES = 1 << 21  # read and converted at a time
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}  # all ones, in place


@dataclass(frozen=True)
class Model:
    """A decoder ready to run: `nnx.merge(graph, params)` is the module; `config` says what it is."""

    config: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State
    scanned: bool = False


@dataclass(frozen=True)
class _Parameter:
    """One parameter and the tensors that it is made of: one, or one for each layer where layers are stacked."""

    path: tuple
    shape: tuple[int, ...]  # with the leading axis of stacked layers, if any
    axes: tuple[str | None, ...]
    weights: tuple[Weight, ...]
    stacked: bool


def abstract_decoder(config: ModelConfig, *, scan_layers: bool, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder with shapes in place of arrays."""
    make = lambda: Decoder(config, scan_layers=scan_layers, dtype=dtype, rngs=nnx.Rngs(0))
    return nnx.split(nnx.eval_shape(make, graph=False), graph=False)


def load_model(
    source: TensorSource, *, dtype, mesh: Mesh, rules: ShardingRules, scan_layers: bool = False, progress: Callable | None = None
) -> Model:
    """Reads a checkpoint into a decoder whose parameters have `dtype` and are placed on `mesh` by `rules`.

    At no time are more host copies alive than two tensors. `progress(bytes)` is called as bytes arrive.
    Raises one CheckpointError that lists every tensor that is missing, unknown, misshapen, or not finite.
    """
    config = config_from_hf(source.config)
    graph, state = abstract_decoder(config, scan_layers=scan_layers, dtype=dtype)
    parameters = _plan(source, config, state)
    not_finite: list[str] = []

    def load(p: _Parameter) -> jax.Array:
        axes = ("layers", *p.axes) if p.stacked else p.axes
        sharding = named_sharding(mesh, rules, axes)
        # A replicated shard is asked for once a device: it is read once.
        read = lru_cache(maxsize=None)(lambda bounds: _read(source, p, tuple(slice(*b) for b in bounds), dtype, not_finite))
        full = lambda index: tuple(s.indices(n)[:2] for s, n in zip(index, p.shape, strict=True))
        array = jax.make_array_from_callback(p.shape, sharding, lambda index: read(full(index)))
        if progress is not None:
            progress(array.nbytes)
        return array

    with ThreadPoolExecutor(2) as pool:  # two tensors at once: one is read while the other is converted
        arrays = list(pool.map(load, parameters))
    if not_finite:
        raise CheckpointError(
            f"{source.path}: NaN or infinity in {_some(sorted(set(not_finite)))} (as {jnp.dtype(dtype).name}). "
            "Get the checkpoint again, or choose a dtype that holds its values"
        )
    flat = dict(nnx.to_flat_state(state))
    for p, array in zip(parameters, arrays, strict=True):
        flat[p.path] = flat[p.path].replace(array)
    return Model(config, graph, nnx.from_flat_state(flat.items()), scan_layers)


def check_names(source: TensorSource) -> ModelConfig:
    """Raises what `load_model` would raise about the configuration, names and shapes, without reading a tensor."""
    config = config_from_hf(source.config)
    _plan(source, config, abstract_decoder(config, scan_layers=False, dtype=jnp.float32)[1])
    return config


def _plan(source: TensorSource, config: ModelConfig, state: nnx.State) -> list[_Parameter]:
    """Pairs every parameter with its tensors; raises one CheckpointError with all that does not fit."""
    names = weight_names(source, config)
    parameters, used, problems = [], set(), []
    flat = nnx.to_flat_state(state)
    scanned = any(path[0] == "blocks" for path, _ in flat)
    for path, variable in flat:
        key, layers = layers_of(path, config, scanned)
        weights = tuple(replace(names[key], name=names[key].name.format(i=i)) for i in layers)
        stacked = path[0] == "blocks"
        shape = tuple(variable.shape)
        parameters.append(_Parameter(path, shape, variable.logical_axes, weights, stacked))
        for w in weights:
            used.add(w.name)
            if w.name not in source.tensors:
                hint = " (config.json says tie_word_embeddings=false)" if w.name == "lm_head.weight" else ""
                problems.append(f"{w.name} is missing{hint}")
                continue
            if (stored := source.tensors[w.name].dtype_name) not in _EXPONENTS:
                problems.append(f"{w.name} is of type {stored}, and weights must be one of {', '.join(_EXPONENTS)}")
            found, expected = tuple(source.tensors[w.name].shape), _stored_shape(shape[1:] if stacked else shape, w)
            fits = len(found) == len(expected) and all(f == e or (e is None) for f, e in zip(found, expected, strict=True))
            if not fits:
                problems.append(f"{w.name} has shape {list(found)}, and the configuration makes it {[e or 'any' for e in expected]}")
    problems += _fused_too_long(parameters, source)
    ignored = [*family_of(config.family).IGNORED, *(("*lm_head.weight",) if config.tie_embeddings else ())]
    unknown = [n for n in source.tensors if n not in used and not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignored)]
    problems += [f"{name} matches nothing in a {config.family} model" for name in unknown]
    if problems:
        raise CheckpointError(f"{source.path} does not fit its own configuration: {_some(problems)}")
    return parameters


def weight_names(source: TensorSource, config: ModelConfig) -> dict[str, Weight]:
    """The family's weight map, spelled as this checkpoint spells it: some exports leave a prefix out, or move it."""
    family = family_of(config.family)
    names = family.weights(config)
    prefix = getattr(family, "OPTIONAL_PREFIX", None)
    if prefix and not any(name.startswith(prefix) for name in source.tensors):
        return {ours: replace(w, name=w.name.removeprefix(prefix)) for ours, w in names.items()}
    for old, new in getattr(family, "ALTERNATIVE_PREFIXES", {}).items():
        if not any(name.startswith(old) for name in source.tensors):
            names = {ours: replace(w, name=new + w.name.removeprefix(old)) if w.name.startswith(old) else w for ours, w in names.items()}
    return names


def layers_of(path: tuple, config: ModelConfig, scanned: bool) -> tuple[str, list[int]]:
    """The path as the weight maps spell it ("layers.{i}.mlp.up_proj.weight"), and the layers that the parameter holds."""
    period = config.period
    repeats = config.num_layers // period if scanned else 0
    key = ".".join(map(str, ("layers", "{i}", *path[2:])))
    if path[0] == "blocks":
        return key, [r * period + path[1] for r in range(repeats)]
    if path[0] == "layers":  # what the scan leaves over
        return key, [repeats * period + path[1]]
    return ".".join(map(str, path)), [0]


def _stored_shape(shape: tuple[int, ...], w: Weight) -> tuple[int | None, ...]:
    """The shape of the tensor in the checkpoint; None where it is a fused axis, which is checked apart."""
    out = (shape[1], shape[0]) if w.kind == "conv1d" else shape
    if w.part is None:
        return out
    axis = _fused_axis(w)
    return tuple(None if i == axis % len(out) else n for i, n in enumerate(out))


def _fused_axis(w: Weight) -> int:
    return -1 if w.kind == "conv1d" else 0


def _fused_too_long(parameters: list[_Parameter], source: TensorSource) -> Iterator[str]:
    ends: dict[str, tuple[int, int]] = {}
    for w in (w for p in parameters for w in p.weights if w.part is not None):
        ends[w.name] = (max(ends.get(w.name, (0, 0))[0], w.part[1]), _fused_axis(w))
    for name, (end, axis) in ends.items():
        if name in source.tensors and (found := source.tensors[name].shape) and found[axis] != end:  # one without axes is named above
            yield f"{name} has {found[axis]} fused features, and the configuration makes it {end}"


def _read(source: TensorSource, p: _Parameter, index: tuple[slice, ...], dtype, not_finite: list[str]) -> np.ndarray:
    """The part of a parameter that `index` selects, on the host."""
    out = _aligned_empty(tuple(s.stop - s.start for s in index), dtype)
    if p.stacked:
        for layer, w in zip(out, p.weights[index[0]], strict=True):
            _fill(layer, source, w, index[1:], not_finite)
    else:
        _fill(out, source, p.weights[0], index, not_finite)
    return out


def _fill(out: np.ndarray, source: TensorSource, w: Weight, index: tuple[slice, ...], not_finite: list[str]) -> None:
    """Reads part of a tensor into `out`, some rows at a time: a whole dequantised tensor is never held besides."""
    if w.kind == "conv1d":
        index, out = index[::-1], out.T
    if w.part is not None:
        axis = _fused_axis(w) % len(index)
        s = index[axis]
        index = (*index[:axis], slice(w.part[0] + s.start, w.part[0] + s.stop), *index[axis + 1 :])
    first, rows = index[0].start, len(out)
    step = max(1, _PIECE_VALUES * rows // max(1, out.size))
    for row in range(0, rows, step):
        piece = out[row : row + step]
        with np.errstate(over="ignore"):
            piece[...] = source.read(w.name, (slice(first + row, first + row + len(piece)), *index[1:]))
        if not all_finite(piece):  # stored so, or too large for the dtype
            not_finite.append(w.name)


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX's CPU backend takes as it is where others are copied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def all_finite(x: np.ndarray) -> bool:
    """Whether no exponent is all ones: one pass over the bits, which numpy does fast for every float type."""
    if x.dtype.name not in _EXPONENTS:
        return True  # integers
    exponent = _EXPONENTS[x.dtype.name]
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    magnitude = np.bitwise_and(x.view(bits), bits((1 << (8 * x.dtype.itemsize - 1)) - 1))
    return magnitude.size == 0 or int(magnitude.max()) < exponent


def _some(items: list[str], limit: int = 12) -> str:
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
