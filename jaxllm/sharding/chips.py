"""What makers publish of their chips."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Of one device as JAX counts them (on v7x two a chip): bytes, bytes a second, bfloat16 operations a second, published peaks.

    `compiler_name` is the compiler's, `device_kinds` are JAX's for devices that are there. `shape` is how many numbers its
    topologies have ("2x2": 2), and `usual` are some of them. `platform`: tpu or gpu. `flops_per_cycle`: of a TPU's matrix units
    (v4 to v5p of 128 x 128, then of 256 x 256; as many as make the compiler's cycles of a large product just less than the peak).
    `libtpu_flags`: what libtpu must be told when it starts, by LIBTPU_INIT_ARGS.
    """

    name: str
    compiler_name: str
    device_kinds: tuple[str, ...]
    memory_bytes: int
    bandwidth: float
    flops: float
    shape: int
    usual: tuple[str, ...]
    platform: str = "tpu"
    flops_per_cycle: int | None = None
    libtpu_flags: tuple[str, ...] = ()

    @property
    def hertz(self) -> float | None:
        """The clock that the peak implies."""
        return None if self.flops_per_cycle is None else self.flops / self.flops_per_cycle

    def missing_flags(self) -> str:
        """Those of `libtpu_flags` of which LIBTPU_INIT_ARGS says nothing, as it would say them."""
        said = os.environ.get("LIBTPU_INIT_ARGS", "")
        return " ".join(flag for flag in self.libtpu_flags if flag.partition("=")[0] not in said)


# On v7x bfloat16 weights come in tiles of 8 rows, which JAX cannot change, and products want them in tiles of 16: without this flag, a step
# copies all weights into such tiles before it multiplies (Llama-3-8B over 8 devices: 1.6 GiB more of temporaries, 1.7 times the bytes).
_TILES_AS_THEY_COME = ("--xla_tpu_impure_enable_large_2nd_minor_layout=false",)


# Google Cloud's pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x"; of v5e's 16 and v6e's 32 GiB the runtime keeps a part.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", ("TPU v4",), 32 * 2**30, 1228e9, 275e12, 3, ("2x2x1", "2x2x2", "2x2x4"), flops_per_cycle=2**18),
        Chip("v5e", "v5e", ("TPU v5 lite",), int(15.75 * 2**30), 819e9, 197e12, 2, ("1x1", "2x2", "2x4", "4x4"), flops_per_cycle=2**17),
        Chip("v5p", "v5p", ("TPU v5", "TPU v5p"), 95 * 2**30, 2765e9, 459e12, 3, ("2x2x1", "2x2x2", "2x2x4"), flops_per_cycle=2**18),
        Chip("v6e", "v6e", ("TPU v6 lite",), int(31.25 * 2**30), 1640e9, 918e12, 2, ("1x1", "2x2", "2x4", "4x4"), flops_per_cycle=2**19),
        Chip(
            "v7x",
            "tpu7x",
            ("TPU7x",),
            96 * 2**30,
            3690e9,
            1153.5e12,
            3,
            ("2x2x1", "2x2x2", "2x2x4"),
            flops_per_cycle=2**19,
            libtpu_flags=_TILES_AS_THEY_COME,
        ),
    )
}
