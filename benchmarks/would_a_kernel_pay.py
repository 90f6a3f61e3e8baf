"""Where XLA loses to a kernel, and where not: products and sampling of Llama-3-8B, compiled for a TPU that is not here, what they move
against the least that they must, and what the compiler thinks they take against the bound that the chip's bandwidth and peak set.

    python benchmarks/would_a_kernel_pay.py [--topology v6e:1x1] [--only int8]

One chip, no other; sequences decode. `least`: each operand and result once.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.planning.chips import Topology, find_topology
from jaxllm.planning.hlo import Program, memory
from jaxllm.serving import sampling

HIDDEN, MLP, LAYERS, VOCAB = 4096, 14336, 8, 128256
EXPERTS, CHOSEN = 8, 2  # as Mixtral 8x7B, whose layers have these sizes
MIB = 2**20


def norm(x, scale):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def product(x, w):
    return x @ w


def weight_only(x, w, scale):
    """A scale for each output."""
    return (x @ w.astype(x.dtype)) * scale


def weight_only_in_groups(x, w, scale):
    """w [groups, size, out], scale [groups, out]: a scale for each output and group of inputs."""
    whole = (w.astype(x.dtype) * scale[:, None]).reshape(-1, w.shape[-1])
    return x @ whole


def groups_apart(x, w, scale):
    """The same, with the scale on each group's product."""
    parts = jnp.einsum("bgi,gio->bgo", x.reshape(len(x), *w.shape[:2]), w.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.sum(parts * scale, axis=1).astype(x.dtype)


def in_a_scan(one, x, *stacked):
    """As an engine's layers are: each product's results go to the next, cut to size."""
    return jax.lax.scan(lambda x, layer: (one(x, *layer)[:, : x.shape[1]], None), x, stacked)[0]


def normed(x, scale, w):
    return norm(x, scale) @ w


def normed_apart(x, scale, w):
    return jax.lax.optimization_barrier(norm(x, scale)) @ w


def filtered(logits, top_k, top_p, u):
    """jaxllm's top-k and top-p by bisection, and a draw."""
    probs = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    return sampling._inverse_cdf(sampling._top_p(sampling._top_k(probs, logits, top_k), logits, top_p), u)


def by_sorting(logits, top_k, top_p, u):
    """As vLLM's plain path has it."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    kth = jnp.take_along_axis(ordered, top_k[:, None] - 1, -1)
    probs = jax.nn.softmax(jnp.where(ordered < kth, -jnp.inf, ordered), -1)
    least = jnp.min(jnp.where(jnp.cumsum(probs, -1) - probs < top_p[:, None], ordered, jnp.inf), -1, keepdims=True)
    return sampling._inverse_cdf(jnp.where(logits >= least, jnp.exp(logits - ordered[:, :1]), 0.0), u)


def by_lax_top_k(logits, top_p, u):
    """Where no request asks for more than 64: of those alone."""
    values, tokens = jax.lax.top_k(logits, 64)
    probs = jax.nn.softmax(values, -1)
    probs = jnp.where(jnp.cumsum(probs, -1) - probs < top_p[:, None], probs, 0.0)
    return jnp.take_along_axis(tokens, sampling._inverse_cdf(probs, u)[:, None], -1)


def grouped(x, w, sizes):
    """Rows in order of their expert."""
    return jax.lax.ragged_dot(x, w, sizes)


def cases() -> dict[str, tuple[Callable, tuple]]:
    """Name -> a function and its arguments' (shape, type)."""
    bf16, f32, s8, s4 = jnp.bfloat16, jnp.float32, jnp.int8, jnp.int4
    x, rows = ((64, HIDDEN), bf16), 64
    long = ((2048, HIDDEN), bf16)
    weight = lambda dtype, *lead: ((*lead, HIDDEN, MLP), dtype)
    scale = lambda *lead: ((*lead, MLP), bf16)
    in_groups = ((HIDDEN // 128, 128, MLP), s4), ((HIDDEN // 128, MLP), bf16)
    row = lambda dtype: ((rows,), dtype)
    logits, share = ((rows, VOCAB), f32), ((rows, VOCAB // 4), f32)
    asked = row(jnp.int32), row(f32), row(f32)
    mixture = lambda rows: (((rows * CHOSEN, HIDDEN), bf16), weight(bf16, EXPERTS), ((EXPERTS,), jnp.int32))
    return {
        "bfloat16 weights, 64 rows": (product, (x, weight(bf16))),
        f"bfloat16 weights, 64 rows, {LAYERS} layers in a scan": (partial(in_a_scan, product), (x, weight(bf16, LAYERS))),
        "int8 weights, 64 rows": (weight_only, (x, weight(s8), scale())),
        f"int8 weights, 64 rows, {LAYERS} layers in a scan": (partial(in_a_scan, weight_only), (x, weight(s8, LAYERS), scale(LAYERS))),
        "int8 weights, 2,048 rows": (weight_only, (long, weight(s8), scale())),
        "int4 weights, 64 rows": (weight_only, (x, weight(s4), scale())),
        f"int4 weights, 64 rows, {LAYERS} layers in a scan": (partial(in_a_scan, weight_only), (x, weight(s4, LAYERS), scale(LAYERS))),
        "int4 weights in groups of 128, scaled before the product": (weight_only_in_groups, (x, *in_groups)),
        "int4 weights in groups of 128, scaled after it": (groups_apart, (x, *in_groups)),
        "RMSNorm and a product, 64 rows": (normed, (x, ((HIDDEN,), bf16), weight(bf16))),
        "RMSNorm and a product, 2,048 rows": (normed, (long, ((HIDDEN,), bf16), weight(bf16))),
        "RMSNorm, a barrier and a product, 2,048 rows": (normed_apart, (long, ((HIDDEN,), bf16), weight(bf16))),
        "the product alone, 2,048 rows": (product, (long, weight(bf16))),
        "top-k and top-p, 64 x 128,256, jaxllm's": (filtered, (logits, *asked)),
        "top-k and top-p, 64 x 32,064 (a quarter), jaxllm's": (filtered, (share, *asked)),
        "top-k and top-p, 64 x 128,256, by sorting": (by_sorting, (logits, *asked)),
        "top-k (at most 64) and top-p, 64 x 128,256, `lax.top_k`": (by_lax_top_k, (logits, *asked[1:])),
        "8 experts, 64 rows x 2, `lax.ragged_dot`": (grouped, mixture(rows)),
        "8 experts, 2,048 rows x 2, `lax.ragged_dot`": (grouped, mixture(2048)),
    }  # fmt: skip


def measure(topology: Topology, function: Callable, shapes: tuple) -> tuple[float, float, float, float, float | None]:
    """Bytes moved, the least, bytes of temporaries, the bound in seconds and the compiler's estimate (of what it gives none, as copies
    and sorts, what the bandwidth allows)."""
    mesh = Mesh(topology.devices[:1], ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, PartitionSpec())) for s, dtype in shapes]
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*arguments)
        compiled = lowered.compile()
    cost = Program(compiled.as_text(), "tpu").cost()
    size = lambda x: prod(x.shape) * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) / 8
    least = sum(size(x) for x in (*arguments, *jax.tree.leaves(lowered.out_info)))
    bound = max(least / topology.chip.bandwidth, cost.product_flops / topology.chip.flops)
    return cost.hbm_bytes, least, memory(compiled)["temporaries"], bound, cost.compiler_s(topology.chip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:1x1")
    parser.add_argument("--only", default="", help="what a case's name must have in it")
    asked = parser.parse_args()
    topology = find_topology(asked.topology)
    print(f"{topology.name}\n")
    print("| | moved, MiB | least, MiB | ratio | temporaries, MiB | bound, us | compiler's estimate, us |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (function, shapes) in cases().items():
        if asked.only not in name:
            continue
        try:
            moved, least, temporaries, bound, estimate = measure(topology, function, shapes)
        except Exception as error:  # a compiler raises anything: it is a finding
            print(f"| {name} | does not compile: {str(error).splitlines()[0][:100]} | | | | | |", flush=True)
            continue
        said = "none" if estimate is None else f"{1e6 * estimate:.0f}"
        mib = f"{moved / MIB:.1f} | {least / MIB:.1f} | {moved / least:.2f} | {temporaries / MIB:.1f}"
        print(f"| {name} | {mib} | {1e6 * bound:.0f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
