"""One decode step of Llama-3-8B, compiled for a TPU that is not here, written three ways and measured by the same tool (`planning/hlo.py`):

- jaxllm's engine: its own program, sampler and all;
- JAX's own ragged paged attention kernel in a scan over the layers, the cache going through it as xs and ys;
- the layers one after the other, each with a dense cache [sequences, length, heads, head_dim] and attention in plain JAX.

    python benchmarks/decode_side_by_side.py [--topology v6e:2x2] [--sequences 64] [--length 2048]

The other two end with the likeliest token, have no sampler, and share everything else: bfloat16, tensor parallel over all chips.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.launch.plan import read_model_config
from jaxllm.planning.abstract import bytes_on_a_device
from jaxllm.planning.chips import Topology, find_topology
from jaxllm.planning.hlo import Program, memory
from jaxllm.planning.serving import plan_serving

PAGE = 64
CONFIG = Path(__file__).parent.parent / "configs" / "models" / "llama-3-8b.yaml"
P = PartitionSpec


def norm(x, scale):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotate(x, positions, theta):
    """x [B, H, D]: rotary embeddings."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1).astype(x.dtype)


def layer(weights, x, positions, theta, attend):
    """`attend(q [B, Hq, D], k, v [B, Hk, D]) -> ([B, Hq, D], cache)`."""
    y = norm(x, weights["norm1"])
    q, k, v = (jnp.einsum("be,ehd->bhd", y, weights[name]) for name in ("q", "k", "v"))
    out, cache = attend(rotate(q, positions, theta), rotate(k, positions, theta), v)
    x = x + jnp.einsum("bhd,hde->be", out, weights["o"])
    y = norm(x, weights["norm2"])
    return x + (jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"], cache


def ends(weights, x):
    return jnp.argmax(norm(x, weights["norm"]) @ weights["head"], -1)


def paged_scan(mesh, theta, weights, cache, tokens, positions, tables):
    """`cache` [L, pages, PAGE, 2 Hk, D], keys and values in turn."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    n = len(tokens)

    def attend(pages, q, k, v):
        def on_a_chip(q, k, v, pages, tables, positions):
            new = jnp.stack([k, v], 2).reshape(n, -1, k.shape[-1])
            pages = pages.at[tables[jnp.arange(n), positions // PAGE], positions % PAGE].set(new)
            starts, number = jnp.arange(n + 1, dtype=jnp.int32), jnp.array([n], jnp.int32)
            sizes = dict(num_kv_pages_per_block=8, num_queries_per_block=32, vmem_limit_bytes=64 << 20)  # its table asks the chip at hand
            kernel = partial(ragged_paged_attention, sm_scale=q.shape[-1] ** -0.5, **sizes)
            return kernel(q, pages, positions + 1, tables, starts, number), pages

        heads = P(None, "x")
        specs = (heads, heads, heads, P(None, None, "x"), P(), P())
        return jax.shard_map(on_a_chip, mesh=mesh, in_specs=specs, out_specs=(heads, P(None, None, "x")), check_vma=False)(
            q, k, v, pages, tables, positions
        )

    def body(x, xs):
        weights, pages = xs
        return layer(weights, x, positions, theta, partial(attend, pages))

    x, cache = jax.lax.scan(body, weights["embed"][tokens], (weights["layers"], cache))
    return ends(weights, x), cache


def dense_unrolled(theta, weights, cache, tokens, positions):
    """`cache`: for each layer keys and values [B, S, Hk, D]."""

    def attend(keys, values, q, k, v):
        rows = jnp.arange(len(q))
        keys, values = keys.at[rows, positions].set(k), values.at[rows, positions].set(v)
        grouped = q.reshape(len(q), keys.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("bhgd,bshd->bhgs", grouped, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        seen = jnp.arange(keys.shape[1]) <= positions[:, None, None, None]
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(q.dtype)
        return jnp.einsum("bhgs,bshd->bhgd", shares, values).reshape(q.shape), (keys, values)

    x, after = weights["embed"][tokens], []
    for each, (keys, values) in zip(weights["layers"], cache, strict=True):
        x, kept = layer(each, x, positions, theta, partial(attend, keys, values))
        after.append(kept)
    return ends(weights, x), after


def abstract(mesh: Mesh, config, n: int, length: int):
    """Weights (of stacked layers, and of each), caches, and inputs."""
    c = config
    shape = lambda sizes, *spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*spec)))
    e, d, hq, hk, f = c.hidden_size, c.head_dim, c.num_heads, c.num_kv_heads, c.intermediate_size
    one = {
        "q": ((e, hq, d), (None, "x")), "k": ((e, hk, d), (None, "x")), "v": ((e, hk, d), (None, "x")), "o": ((hq, d, e), ("x",)),
        "gate": ((e, f), (None, "x")), "up": ((e, f), (None, "x")), "down": ((f, e), ("x",)), "norm1": ((e,), ()), "norm2": ((e,), ()),
    }  # fmt: skip
    whole = {"embed": shape((c.vocab_size, e)), "head": shape((e, c.vocab_size), None, "x"), "norm": shape((e,))}
    stacked = whole | {"layers": {k: shape((c.num_layers, *sizes), None, *spec) for k, (sizes, spec) in one.items()}}
    each = whole | {"layers": [{k: shape(sizes, *spec) for k, (sizes, spec) in one.items()} for _ in range(c.num_layers)]}
    columns = length // PAGE
    paged = shape((c.num_layers, n * columns, PAGE, 2 * hk, d), None, None, None, "x")
    dense = [(shape((n, length, hk, d), None, None, "x"),) * 2 for _ in range(c.num_layers)]
    integers = lambda *sizes: shape(sizes, dtype=jnp.int32)
    return stacked, each, paged, dense, integers(n), integers(n), integers(n, columns)


def measure(function, arguments, mesh: Mesh, topology: Topology) -> dict:
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=1).lower(*arguments).compile()
    seconds, cost = time.perf_counter() - start, Program(compiled.as_text(), "tpu").cost()
    reduced = sum(c.count for c in cost.list_collectives() if c.kind in ("all-reduce", "reduce-scatter"))
    return {"moved": cost.hbm_bytes, "temporaries": memory(compiled)["temporaries"], "reductions": reduced, "compile_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    asked = parser.parse_args()
    topology, config = find_topology(asked.topology), read_model_config(str(CONFIG))
    chips = len(topology.devices)
    mesh = Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    theta = 500000.0
    stacked, each, paged, dense, tokens, positions, tables = abstract(mesh, config, asked.sequences, asked.length)
    report = plan_serving(config, topology, tensor=chips, max_num_seqs=asked.sequences, max_model_len=asked.length, page_size=PAGE).decode
    reductions = sum(c.count for c in report.collectives if c.kind in ("all-reduce", "reduce-scatter"))
    ours = {"moved": report.bytes_moved, "temporaries": report.temporaries, "reductions": reductions, "compile_s": report.compile_s}
    scanned, unrolled = (stacked, paged, tokens, positions, tables), (each, dense, tokens, positions)
    rows = {
        "jaxllm": ours,
        "JAX's kernel in a layer scan": measure(partial(paged_scan, mesh, theta), scanned, mesh, topology),
        "unrolled, dense cache": measure(partial(dense_unrolled, theta), unrolled, mesh, topology),
    }
    least = bytes_on_a_device(stacked) - bytes_on_a_device(stacked["embed"]) + bytes_on_a_device(paged)
    print(f"Llama-3-8B, {asked.sequences} x {asked.length}, {asked.topology}, a chip; the least to move is {least / 2**30:.2f} GiB\n")
    print("| | moved, GiB | of the least | temporaries, GiB | all-reduces | compile, s |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        moved = f"{row['moved'] / 2**30:.2f} | {row['moved'] / least:.2f} | {row['temporaries'] / 2**30:.3f}"
        print(f"| {name} | {moved} | {row['reductions']} | {row['compile_s']:.0f} |")


if __name__ == "__main__":
    main()
