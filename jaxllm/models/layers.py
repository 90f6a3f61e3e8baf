"""The parts of a Transformer layer. Leading axes are free: [T] ragged tokens when serving, [B, T] when training."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.config import LayerConfig, ModelConfig
from jaxllm.models.rope import Table, apply_rope
from pallas_kernels.row_sum import row_sum

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Attend(Protocol):
    """How queries meet keys and values: the one thing that differs between training and serving.

    It gets q [*T, num_heads, head_dim], k and v [*T, num_kv_heads, head_dim], whatever is carried as the cache, and the
    number of the layer; it returns the mixed values, shaped like q, and the cache.
    """

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Any,
        layer: Int[Array, ""] | int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Array, Any]: ...


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], *, init: str = "normal", dtype, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter that carries the logical name of each of its axes, for `jaxllm.sharding` to place."""
    make = {
        "normal": lambda: 0.02 * jax.random.normal(rngs.params(), shape, dtype),
        "zeros": lambda: jnp.zeros(shape, dtype),
        "ones": lambda: jnp.ones(shape, dtype),
    }[init]
    return nnx.Param(make(), logical_axes=axes)


def matmul(x: Float[Array, "*T D"], w: Float[Array, "F D"]) -> Float[Array, "*T F"]:
    """x @ w.T in their own type; float32 stays float32 on chips whose default is to multiply it in bfloat16."""
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    product = lambda x, w: jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    if x.size == x.shape[-1] and w.dtype.itemsize == 2:
        # XLA's CPU backend has a loop over numbers, ten times slower, for one row of bfloat16, and none for two.
        two = lambda x, w: product(jnp.repeat(x.reshape(1, -1), 2, axis=0), w)[:1].reshape(*x.shape[:-1], -1)
        return _gradient_as_one(jax.lax.platform_dependent(x, w, cpu=two, default=product))
    return _gradient_as_one(product(x, w))


@jax.custom_vjp
def _gradient_as_one(y: Array) -> Array:
    """y, whose gradient is computed once on the CPU, before it is transposed for the product that makes the weights'. XLA would fuse the
    two, and read all that the gradient is made of column by column."""
    return y


_gradient_as_one.defvjp(
    lambda y: (y, None), lambda _, g: (jax.lax.platform_dependent(g, cpu=jax.lax.optimization_barrier, default=lambda g: g),)
)


# For the backward pass, what is made of few numbers in little time is made anew, and only what it is made of is kept: in bfloat16 a
# layer keeps a third of what it would otherwise. (A product at the end of such a function is not computed again: its result is not read.
# The two passes are loops of their own, so that XLA does not merge them and need not be kept from it.)
anew = partial(jax.checkpoint, prevent_cse=False)


class Linear(nnx.Module):
    """y = x W^T + b with W [out, in]: as checkpoints store it, and XLA's CPU backend multiplies few rows by it fastest."""

    def __init__(self, n_in: int, n_out: int, axes: tuple[str | None, str | None], *, bias: bool = False, dtype, rngs: nnx.Rngs):
        """`axes` are the logical names of the input and the output features."""
        self.weight = parameter((n_out, n_in), axes[::-1], dtype=dtype, rngs=rngs)
        self.bias = parameter((n_out,), axes[1:], init="zeros", dtype=dtype, rngs=rngs) if bias else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T F"]:
        y = matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467) or LayerNorm with bias, over the last axis, in float32."""

    def __init__(self, config: ModelConfig, size: int, axis: str | None = None, *, dtype, rngs: nnx.Rngs):
        # A weight w stands for (offset + w), so that Gemma's zero-centred weights are kept as they are on disk.
        init = "zeros" if config.norm_offset else "ones"
        self.weight = parameter((size,), (axis,), init=init, dtype=dtype, rngs=rngs)
        self.bias = parameter((size,), (axis,), init="zeros", dtype=dtype, rngs=rngs) if config.norm == "layer" else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return anew(self._normalized)(x)

    def _normalized(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        y, size = x.astype(jnp.float32), x.shape[-1]
        if self.bias is not None:
            y -= row_sum(y) / size
        y *= jax.lax.rsqrt(row_sum(jnp.square(y)) / size + self.eps)
        y *= self.offset + self.weight[...].astype(jnp.float32)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype, rngs: nnx.Rngs):
        c, make = config, partial(Linear, dtype=dtype, rngs=rngs)
        norm = partial(Norm, config, dtype=dtype, rngs=rngs)
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = make(c.hidden_size, q_size, ("embed", "heads"), bias=c.qkv_bias)
        self.k_proj = make(c.hidden_size, kv_size, ("embed", "kv_heads"), bias=c.qkv_bias)
        self.v_proj = make(c.hidden_size, kv_size, ("embed", "kv_heads"), bias=c.qkv_bias)
        self.o_proj = make(q_size, c.hidden_size, ("heads", "embed"), bias=c.output_bias)
        full = c.qk_norm == "full"
        self.q_norm = norm(q_size if full else c.head_dim, "heads" if full else None) if c.qk_norm else None
        self.k_norm = norm(kv_size if full else c.head_dim, "kv_heads" if full else None) if c.qk_norm else None
        self.config, self.layer = config, layer

    def __call__(self, x: Float[Array, "*T D"], ropes: dict[str, Table], attend: Attend, cache: Any, number) -> tuple[Array, Any]:
        c, lead = self.config, x.shape[:-1]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*lead, c.num_heads, c.head_dim)
        k, v = (t.reshape(*lead, c.num_kv_heads, c.head_dim) for t in (k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layer.rope is not None:
            q, k = (apply_rope(t, ropes[self.layer.rope]) for t in (q, k))
        out, cache = attend(q, k, v, cache, number, scale=c.scale, window=self.layer.window, softcap=c.attention_softcap)
        return self.o_proj(out.reshape(*lead, c.num_heads * c.head_dim)), cache


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        c, make = config, partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = make(c.hidden_size, c.intermediate_size, ("embed", "mlp")) if c.gated_mlp else None
        self.up_proj = make(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.down_proj = make(c.intermediate_size, c.hidden_size, ("mlp", "embed"))
        self.activation = c.activation

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        act = ACTIVATIONS[self.activation]
        up = self.up_proj(x)
        if self.gate_proj is None:
            return anew(lambda up: self.down_proj(act(up)))(up)
        return anew(lambda gate, up: self.down_proj(act(gate) * up))(self.gate_proj(x), up)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each with a residual sum and with norms where `norm_placement` says."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype, rngs: nnx.Rngs):
        norm = partial(Norm, config, config.hidden_size, dtype=dtype, rngs=rngs)
        before, after = config.norm_placement in ("pre", "both"), config.norm_placement != "pre"
        self.attn_norm = norm() if before else None
        self.self_attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if after else None
        self.norm_sum = config.norm_placement == "residual"

    def _add(self, x: Array, branch: Array, post_norm: Norm | None) -> Array:
        if post_norm is None:
            return x + branch
        return post_norm(x + branch) if self.norm_sum else x + post_norm(branch)

    def __call__(self, x: Float[Array, "*T D"], ropes: dict[str, Table], attend: Attend, cache: Any, number) -> tuple[Array, Any]:
        h = x if self.attn_norm is None else self.attn_norm(x)
        h, cache = self.self_attn(h, ropes, attend, cache, number)
        x = self._add(x, h, self.attn_post_norm)
        h = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return self._add(x, h, self.mlp_post_norm), cache
