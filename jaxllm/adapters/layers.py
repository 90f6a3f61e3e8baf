"""What an adapter computes, around a Linear that knows nothing of it.

Parameters are those of one layer, or have a leading axis of layers where the model's layers are stacked (a scan takes it away
before anything here is called). Layers of a stack that the adapter leaves out, or gives a lower rank, have zeros in its place: their
gradients are then exactly zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.adapters.quantize import weight_of
from jaxllm.adapters.variables import AdapterConstant, AdapterParam
from jaxllm.models.layers import matmul


class Lora(nnx.Module):
    """scaling * B A x (LoRA), or what replaces W x where the norm of every row is learned apart (DoRA).

    `ranks` and `scalings` have one entry a layer (rank 0: not adapted).
    """

    def __init__(self, n_in, n_out, axes, ranks, scalings, *, stacked, dropout=0.0, init=True, rngs: nnx.Rngs, dtype=jnp.float32):
        lead = (len(ranks),) if stacked else ()
        r = max(ranks)
        shape_a, shape_b = (*lead, r, n_in), (*lead, n_out, r)
        if init == "gaussian":
            a = jax.random.normal(rngs.params(), shape_a, dtype) / max(r, 1)
        else:  # torch's kaiming_uniform_ with a = sqrt(5)
            a = jax.random.uniform(rngs.params(), shape_a, dtype, -1, 1) / np.sqrt(n_in)
        b = jnp.zeros(shape_b, dtype) if init else jax.random.uniform(rngs.params(), shape_b, dtype, -1, 1) / np.sqrt(r)
        if stacked and min(ranks) < r:
            used = np.arange(r) < np.array(ranks)[:, None]
            a, b = a * used[:, :, None], b * used[:, None, :]
        self.lora_A = AdapterParam(a, logical_axes=(None, axes[0]))
        self.lora_B = AdapterParam(b, logical_axes=(axes[1], None))
        chosen = [s for s, rank in zip(scalings, ranks, strict=True) if rank]
        one = len(set(chosen)) == 1  # what is left out is zero whatever the scaling
        self.scaling = chosen[0] if one else AdapterConstant(jnp.asarray(scalings, dtype), logical_axes=())
        self.active = AdapterConstant(jnp.asarray([rank > 0 for rank in ranks]), logical_axes=()) if 0 in ranks else None
        self.magnitude = None  # DoRA's, [out]
        self.weight_norm = None  # of W + scaling B A, kept where DoRA has been merged so that it can be undone
        self.dropout, self.key = dropout, None

    def _scaling(self, dtype):
        return self.scaling[...].astype(dtype) if isinstance(self.scaling, nnx.Variable) else self.scaling

    def delta(self) -> Float[Array, "*L F D"]:
        """scaling * B A, for one layer or for a stack of them."""
        precision = jax.lax.Precision.HIGHEST
        scaling = self._scaling(jnp.float32)
        scaling = scaling[:, None, None] if jnp.ndim(scaling) else scaling
        return scaling * jnp.matmul(_float32(self.lora_B), _float32(self.lora_A), precision=precision)

    def start_dora(self, weight: Float[Array, "*L F D"], axes: tuple) -> None:
        self.magnitude = nnx.data(AdapterParam(self._norm(weight).astype(self.lora_A.dtype), logical_axes=axes[1:]))

    def _norm(self, weight: Array, rows: slice = slice(None)) -> Float[Array, "*L F"]:
        return jnp.linalg.norm(weight.astype(jnp.float32) + self.delta()[..., rows, :], axis=-1)

    def __call__(self, base: nnx.Module, x: Float[Array, "*T D"], rows: slice = slice(None)) -> Float[Array, "*T F"]:
        """What `base`, the Linear of these rows of the adapted matrix, gives for x with the adapter on."""
        y, a, b = base(x), self.lora_A[...], self.lora_B[...][rows]
        dropped = self._drop(x)
        lora = matmul(matmul(dropped.astype(a.dtype), a) * self._scaling(a.dtype), b)
        if self.magnitude is None:
            return y + lora.astype(y.dtype)
        # The norm is taken as a constant in backpropagation: section 4.3 of the paper.
        norm = jax.lax.stop_gradient(self._norm(weight_of(base), rows))
        factor = self.magnitude[...][rows].astype(jnp.float32) / norm
        if self.active is not None:
            factor = jnp.where(self.active[...], factor, 1.0)
        bias = 0 if base.bias is None else base.bias[...]
        plain = y - bias if self.key is None else base(dropped) - bias
        return y + ((factor - 1) * plain + factor * lora).astype(y.dtype)

    def _drop(self, x: Array) -> Array:
        if self.key is None or not self.dropout:
            return x
        keep = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def merge(self, weight: Array, bias: Array | None, rows: slice = slice(None)) -> tuple[Array, Array | None]:
        """Weight and bias of a Linear that alone gives what base and adapter give."""
        merged = weight.astype(jnp.float32) + self.delta()[..., rows, :]
        if self.magnitude is not None:
            norm = jnp.linalg.norm(merged, axis=-1)
            merged *= self._factor(norm, rows)[..., None]
        return merged.astype(weight.dtype), bias

    def _factor(self, norm: Array, rows: slice) -> Array:
        factor = self.magnitude[...][..., rows].astype(jnp.float32) / norm
        return factor if self.active is None else jnp.where(self.active[...][:, None], factor, 1.0)

    def keep_norm(self, weights: Array) -> None:
        """To be called before merging, with the rows of all parts together, if unmerging is to be possible."""
        if self.magnitude is not None:
            self.weight_norm = nnx.data(AdapterConstant(self._norm(weights), logical_axes=()))

    def unmerge(self, weight: Array, bias: Array | None, rows: slice = slice(None)) -> tuple[Array, Array | None]:
        plain = weight.astype(jnp.float32)
        if self.magnitude is not None:
            plain = plain / self._factor(self.weight_norm[...][..., rows], rows)[..., None]
        return (plain - self.delta()[..., rows, :]).astype(weight.dtype), bias


class IA3(nnx.Module):
    """A factor for each output feature, bias included, or for each input feature (`feedforward`)."""

    def __init__(self, n_in, n_out, axes, which, *, feedforward, stacked, dtype=jnp.float32):
        lead = (len(which),) if stacked else ()
        self.ia3_l = AdapterParam(
            jnp.ones((*lead, n_in if feedforward else n_out), dtype), logical_axes=(axes[0] if feedforward else axes[1],)
        )
        self.feedforward = feedforward
        self.active = None if all(which) else AdapterConstant(jnp.asarray(which), logical_axes=())

    def _factors(self) -> Float[Array, "*L N"]:
        factors = self.ia3_l[...]
        if self.active is None:
            return factors
        active = self.active[...]
        return jnp.where(active[:, None] if active.ndim else active, factors, 1)

    def __call__(self, base: nnx.Module, x: Array, rows: slice = slice(None)) -> Array:
        if self.feedforward:
            return base((x * self._factors()).astype(x.dtype))
        y = base(x)
        return (y * self._factors()[rows]).astype(y.dtype)

    def merge(self, weight: Array, bias: Array | None, rows: slice = slice(None), *, undo: bool = False) -> tuple[Array, Array | None]:
        factors = self._factors().astype(jnp.float32)
        factors = 1 / factors if undo else factors
        if self.feedforward:
            return (weight * factors[..., None, :]).astype(weight.dtype), bias
        factors = factors[..., rows]
        return (weight * factors[..., None]).astype(weight.dtype), None if bias is None else (bias * factors).astype(bias.dtype)

    def keep_norm(self, weights: Array) -> None:
        pass

    def unmerge(self, weight: Array, bias: Array | None, rows: slice = slice(None)) -> tuple[Array, Array | None]:
        return self.merge(weight, bias, rows, undo=True)


class Adapted(nnx.Module):
    """A Linear and its adapter, in the Linear's place. `merged`: the adapter is in the weights already."""

    def __init__(self, base: nnx.Module, adapter: Lora | IA3):
        self.base, self.adapter, self.merged = base, adapter, False

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T F"]:
        return self.base(x) if self.merged else self.adapter(self.base, x)


class FusedAdapted(nnx.Module):
    """An attention or MLP whose Linears `parts` have one adapter together, for Hugging Face keeps them as one matrix."""

    def __init__(self, base: nnx.Module, adapter: Lora | IA3, parts: tuple[str, ...], rows: tuple[tuple[int, int], ...]):
        self.base, self.adapter, self.parts, self.rows, self.merged = base, adapter, parts, rows, False

    def __call__(self, *args):
        if self.merged:
            return self.base(*args)
        module = nnx.merge(*nnx.split(self.base, graph=False))  # its own attributes, the same weights
        for name, (start, stop) in zip(self.parts, self.rows, strict=True):
            setattr(module, name, _Part(getattr(module, name), self.adapter, slice(start, stop)))
        return module(*args)


class _Part(nnx.Module):
    def __init__(self, base: nnx.Module, adapter: Lora | IA3, rows: slice):
        self.base, self.adapter, self.rows = base, adapter, rows

    def __call__(self, x: Array) -> Array:
        return self.adapter(self.base, x, self.rows)


def _float32(variable: nnx.Variable) -> Array:
    return variable[...].astype(jnp.float32)
