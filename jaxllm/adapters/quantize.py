"""Frozen base weights in 4 or 8 bits (QLoRA, Dettmers et al., arXiv 2305.14314), dequantised layer by layer where they are used."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.adapters.variables import AdapterConstant
from jaxllm.errors import ConfigError
from jaxllm.models.layers import Linear, matmul

Method = Literal["nf4", "int8"]
BLOCK, SCALE_BLOCK = 64, 256
NF4 = np.array(  # appendix E of the paper: quantiles of a normal distribution, zero among them
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, in which double quantisation keeps the blocks' scales."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means, *-means]
    return np.sort(np.array(values)).astype(np.float32)


DYNAMIC = _dynamic_map()


def quantize_base(model: nnx.Module, method: Method, *, double_quant: bool = False) -> nnx.Module:
    """The model with every Linear of its layers quantised (embeddings, norms, biases and lm_head are not, as in bitsandbytes).

    `nf4`: 4-bit normal floats in blocks of 64 along the inputs, with float32 scales, or, with `double_quant`, 8-bit scales in blocks
    of 256. `int8`: rounded to nearest, one scale for each output row. The model is then trained through an adapter: add_adapter.
    """
    from jaxllm.adapters.attach import _copy, _replace_linears, has_adapter

    if method not in ("nf4", "int8"):
        raise ConfigError(f"quantisation {method!r} is not implemented; nf4 and int8 are")
    if double_quant and method != "nf4":
        raise ConfigError("double_quant goes with nf4")
    if has_adapter(model):
        raise ConfigError("quantise the base before the adapter is added")
    model = _copy(model)
    outside = (model.lm_head, model.project_in, model.project_out)
    skip = lambda linear: any(linear is other for other in outside)
    _replace_linears(model, lambda linear: linear if skip(linear) else QuantizedLinear(linear, method, double_quant))
    return model


class QuantizedLinear(nnx.Module):
    """y = x W^T + b with W [out, in] stored in 4 or 8 bits."""

    def __init__(self, linear: Linear, method: Method, double_quant: bool = False):
        weight = linear.weight[...]
        self.method, self.double_quant, self.dtype = method, double_quant, weight.dtype
        self.shape, self.axes = tuple(weight.shape[-2:]), linear.weight.logical_axes
        self.bias = linear.bias
        w = weight.astype(jnp.float32)
        if method == "int8":
            scale = jnp.max(jnp.abs(w), axis=-1, keepdims=True) / 127
            codes = jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
            self.codes = AdapterConstant(codes, logical_axes=self.axes)
            self.scales = AdapterConstant(scale, logical_axes=(self.axes[0], None))
            return
        aligned = self.shape[1] % BLOCK == 0  # else blocks run on from row to row, and the matrix stays in one piece
        lead = weight.shape[:-2]
        rows = w if aligned else _padded(w.reshape(*lead, 1, -1), BLOCK)
        blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
        scale = jnp.max(jnp.abs(blocks), axis=-1)
        unit = blocks / jnp.where(scale == 0, 1, scale)[..., None]
        codes = _nearest(unit, NF4).reshape(rows.shape)
        axes = self.axes if aligned else (None, None)
        halves = _stretches(codes)
        self.codes = AdapterConstant((halves[..., 0, :] << 4 | halves[..., 1, :]).reshape(*codes.shape[:-1], -1), logical_axes=axes)
        self.scales = AdapterConstant(scale, logical_axes=axes)
        if double_quant:
            flat = scale.reshape(*lead, -1)
            offset = jnp.mean(flat, axis=-1, keepdims=True)
            groups = _padded(flat - offset, SCALE_BLOCK).reshape(*lead, -1, SCALE_BLOCK)
            top = jnp.max(jnp.abs(groups), axis=-1)
            # 8 bits do not say which block they are of: what they need to be read stays whole on every device.
            unit = groups / jnp.where(top == 0, 1, top)[..., None]
            coded = _nearest(unit, DYNAMIC).reshape(*lead, -1)[..., : flat.shape[-1]].reshape(scale.shape)
            self.scales = AdapterConstant(coded, logical_axes=axes)
            self.scale_tops = AdapterConstant(top, logical_axes=(None,))
            self.scale_offset = AdapterConstant(offset, logical_axes=(None,))

    def dequantize(self) -> Float[Array, "*L F D"]:
        codes, scales = self.codes[...], self.scales[...]
        if self.method == "int8":
            return (codes.astype(jnp.float32) * scales).astype(self.dtype)
        lead = codes.shape[:-2]
        if self.double_quant:
            count = int(np.prod(scales.shape[-2:]))
            values = jnp.asarray(DYNAMIC)[_padded(scales.reshape(*lead, -1), SCALE_BLOCK)].reshape(*lead, -1, SCALE_BLOCK)
            flat = (values * self.scale_tops[...][..., None]).reshape(*lead, -1)[..., :count] + self.scale_offset[...]
            scales = flat.reshape(scales.shape)
        pairs = _stretches(codes, 1)
        pairs = jnp.concatenate([pairs >> 4, pairs & 15], axis=-2).reshape(*codes.shape[:-1], -1)
        w = _nf4_value(pairs) * jnp.repeat(scales, BLOCK, axis=-1)
        if w.shape[-2:] != self.shape:
            w = w.reshape(*lead, -1)[..., : self.shape[0] * self.shape[1]].reshape(*lead, *self.shape)
        return w.astype(self.dtype)

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T F"]:
        y = matmul(x, self.dequantize())
        return y if self.bias is None else y + self.bias[...]


def weight_of(linear: Linear | QuantizedLinear) -> Float[Array, "*L F D"]:
    return linear.dequantize() if isinstance(linear, QuantizedLinear) else linear.weight[...]


def shape_of(linear: Linear | QuantizedLinear) -> tuple[int, int]:
    """(out, in)"""
    return linear.shape if isinstance(linear, QuantizedLinear) else tuple(linear.weight.shape[-2:])


def dequantized(linear: QuantizedLinear, dtype) -> Linear:
    """A Linear with the values that the quantised one has."""
    n_out, n_in = linear.shape
    empty = nnx.eval_shape(lambda: Linear(n_in, n_out, linear.axes[::-1], dtype=dtype, rngs=nnx.Rngs(0)), graph=False)
    empty.weight = nnx.Param(linear.dequantize().astype(dtype), logical_axes=linear.axes)
    empty.bias = linear.bias
    return empty


def _nearest(unit: Array, table: np.ndarray) -> Array:
    """The index (uint8) of the nearest value of a sorted table."""
    return jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), unit, method="compare_all" if len(table) < 32 else "scan").astype(
        jnp.uint8
    )


def _stretches(codes: Array, parts: int = 2) -> Array:
    """[..., D] -> [..., stretches, parts, n]: the two halves of a stretch share bytes, the first in the high bits. 256 values, whose halves
    fill a TPU's 128 lanes, where rows are made of them; else a block."""
    whole = codes.shape[-1] * 2 // parts
    stretch = 256 if whole % 256 == 0 else BLOCK
    return codes.reshape(*codes.shape[:-1], whole // stretch, parts, stretch // 2)


def _nf4_value(codes: Array) -> Array:
    """NF4[codes], by choosing between values, one bit after the other: a TPU looks up in a table slowly."""
    values = list(NF4)
    for bit in range(4):
        one = (codes >> bit & 1) != 0
        values = [jnp.where(one, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])
