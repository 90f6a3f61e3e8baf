"""The kernels, compiled for chips that are not here, with every feature: what `jaxllm kernels` lists."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.planning.chips import Topology
from jaxllm.planning.hlo import Program, memory
from pallas_kernels.ragged_paged_attention import page_width, ragged_paged_attention, unsupported

_TOKENS, _SEQUENCES, _KEYS = 256, 32, 4096
_PAGES_BYTES = 2**28  # so large that a copy of it would be seen


@dataclass(frozen=True)
class KernelCase:
    """Ragged paged attention of some kind: `heads` query heads for `kv_heads`; pages of `kv_dtype` if not of the queries' type; `sinks`,
    `decode_only` and so on as the op has them."""

    head_dim: int = 128
    dtype: str = "bfloat16"
    heads: int = 8
    kv_heads: int = 2
    page_size: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    decode_only: bool = False
    kv_dtype: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.dtype} {self.heads}:{self.kv_heads} x {self.head_dim}, pages of {self.page_size}"]
        parts += [f"{self.kv_dtype} cache"] if self.kv_dtype else []
        parts += [name for name in ("window", "softcap", "sinks") if getattr(self, name)]
        return ", ".join([*parts, "decode only" if self.decode_only else "mixed"])


@dataclass(frozen=True)
class KernelReport:
    """A case compiled for a chip. Bytes: of temporaries, and those that a call moves, each sequence as long as there is room for.
    `problem`: why it is not compiled, or what is wrong with it. `reason`: why the chip's own kernels cannot, so that XLA's programs
    take their place."""

    chip: str
    case: KernelCase
    implementation: str
    compile_s: float
    temporaries: int
    bytes_moved: int
    problem: str | None
    reason: str | None = None


HEAD_DIMS, DTYPES, PAGE_SIZES = (64, 80, 96, 128, 256), ("bfloat16", "float32"), (16, 32, 64, 128, 256)
KV_DTYPES = ("float8_e4m3fn", "int8")
GROUPS = ((4, 4), (9, 3), (8, 1), (16, 1), (71, 1))
_FEATURES = ({"window": 1000}, {"softcap": 30.0}, {"sinks": True})
_ALL = {"window": 1000, "softcap": 30.0, "sinks": True}


def some_cases() -> list[KernelCase]:
    """Each head_dim in each type, with all features and with none; each feature, grouping of heads and page size by itself."""
    sizes = [KernelCase(head_dim=d, dtype=t, **f) for d, t, f in itertools.product(HEAD_DIMS, DTYPES, ({}, _ALL))]
    features = [KernelCase(**f, decode_only=d) for f, d in itertools.product(({}, *_FEATURES), (False, True))]
    groups = [KernelCase(heads=h, kv_heads=k) for h, k in GROUPS]
    bytes_ = [KernelCase(head_dim=d, kv_dtype=t, **f) for d, t, f in itertools.product((64, 128), KV_DTYPES, ({}, _ALL))]
    return list(dict.fromkeys([*sizes, *features, *groups, *(KernelCase(page_size=p) for p in PAGE_SIZES), *bytes_]))


def all_cases() -> list[KernelCase]:
    """Every head_dim, type, set of features, phase and page size together, and each grouping of heads with every head_dim."""
    sets = [{k: v for f in chosen for k, v in f.items()} for n in range(4) for chosen in itertools.combinations(_FEATURES, n)]
    product = itertools.product(HEAD_DIMS, DTYPES, sets, (False, True), PAGE_SIZES)
    crossed = [KernelCase(head_dim=d, dtype=t, **f, decode_only=o, page_size=p) for d, t, f, o, p in product]
    groups = [KernelCase(heads=h, kv_heads=k, head_dim=d) for (h, k), d in itertools.product(GROUPS, HEAD_DIMS)]
    bytes_ = [
        KernelCase(head_dim=d, kv_dtype=t, **f, decode_only=o, page_size=p)
        for d, t, f, o, p in itertools.product(HEAD_DIMS, KV_DTYPES, ({}, _ALL), (False, True), PAGE_SIZES[1:])
    ]
    return list(dict.fromkeys([*crossed, *groups, *bytes_]))


def compile_kernels(
    topology: Topology, cases: Sequence[KernelCase], *, threads: int = 2, progress: Callable[[KernelReport], None] = lambda _: None
) -> list[KernelReport]:
    """Compiles each case for one chip of the topology; what does not compile, or copies the cache, says so in its report."""

    def one(case: KernelCase) -> KernelReport:
        report = _compile(topology, case)
        progress(report)
        return report

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, cases))


def _compile(topology: Topology, case: KernelCase) -> KernelReport:
    implementation, width = topology.chip.platform, page_width(topology.chip.platform, case.head_dim)
    kv_dtype = jnp.dtype(case.kv_dtype or case.dtype)
    capability = getattr(topology.devices[0], "compute_capability", None) if implementation == "gpu" else None
    report = KernelReport(topology.chip.name, case, implementation, 0.0, 0, 0, None)
    if reason := unsupported(implementation, case.page_size, width, kv_dtype, capability):
        return replace(report, implementation="xla", reason=reason)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    shape = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    wide = partial(shape, dtype=jnp.dtype(case.dtype))
    tokens = _SEQUENCES if case.decode_only else _TOKENS
    page_bytes = 2 * case.kv_heads * case.page_size * width * kv_dtype.itemsize
    pages = shape(_PAGES_BYTES // page_bytes, 2, case.kv_heads, case.page_size, width, dtype=kv_dtype)
    q, k = (wide(tokens, heads, case.head_dim) for heads in (case.heads, case.kv_heads))
    table = shape(_SEQUENCES, _KEYS // case.page_size)
    more = {"sinks": shape(case.heads, dtype=jnp.float32)} if case.sinks else {}
    more |= {"kv_scales": shape(2, case.kv_heads, dtype=jnp.float32)} if kv_dtype.itemsize == 1 else {}
    options = dict(scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, decode_only=case.decode_only)

    def attend(*arrays, **more):
        return ragged_paged_attention(*arrays, **more, **options, implementation=implementation)

    start = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(attend, donate_argnums=3).lower(
                q, k, k, pages, table, shape(_SEQUENCES), shape(_SEQUENCES + 1), shape(2), **more
            )
            compiled = lowered.compile()
    except Exception as error:  # compilers raise anything: it is what the report is for
        return replace(report, compile_s=time.perf_counter() - start, problem=f"{type(error).__name__}: {str(error)[:500]}")
    held, moved = memory(compiled), Program(compiled.as_text(), implementation).cost().hbm_bytes
    copied = held["temporaries"] + held["results"] > _PAGES_BYTES // 4
    report = replace(report, compile_s=time.perf_counter() - start, temporaries=held["temporaries"], bytes_moved=int(moved))
    return replace(report, problem="it makes a second copy of the cache") if copied else report
