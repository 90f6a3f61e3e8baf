"""`jaxllm kernels`: the attention kernels compiled for chips that are not here, with every feature, as a table."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.launch.command import Command
from jaxllm.launch.kernels_table import markdown, print_table, write_markdown

if TYPE_CHECKING:
    from jaxllm.planning.kernels import KernelReport


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Compile ragged paged attention for TPUs and GPUs that are not here, and list what compiles. Fails if anything does not;
    `xla` stands where a chip's own kernels cannot and XLA's programs take their place, with the reason below.

    TPUs need libtpu (jaxllm[plan]), GPUs jax's CUDA plugin (jaxllm[cuda]).

    Example:

      jaxllm kernels --chip v5e --chip v6e
      jaxllm kernels --chip h100 --every
      jaxllm kernels --chip v5e --chip v6e --markdown docs/kernels.md
    """

    chip: tuple[str, ...]
    "One or more of v5e, v5p, v6e, v7x, a100, l4, h100, h200 and b200."
    every: bool = False
    "Every combination of features (hundreds; minutes to hours), not each by itself."
    threads: int = 2
    "Compilations at a time."
    markdown: str | None = None
    "Put the table in this page too, in place of the one that the same chips had there."

    def __post_init__(self) -> None:
        if not self.chip:
            raise ConfigError("chip must name at least one chip")
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")
        if self.markdown is not None and not Path(self.markdown).absolute().parent.is_dir():
            raise ConfigError(f"markdown: {Path(self.markdown).parent} is no folder")


class KernelsError(JaxLLMError):
    """A kernel does not compile, or copies what it should not."""


def run(config: Config) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compilers are wanted, not devices
    from jaxllm.planning import CHIPS, find_topology
    from jaxllm.planning.kernels import all_cases, compile_kernels, some_cases

    cases = all_cases() if config.every else some_cases()
    # A name that is not known is refused by find_topology, with the near ones.
    topologies = [find_topology(f"{chip}:{CHIPS[chip].usual[0]}" if chip in CHIPS else chip) for chip in config.chip]
    reports: list[KernelReport] = []
    for topology in topologies:
        tell = lambda r: print(f"{r.chip}: {r.case}: {r.problem or r.reason or f'{r.compile_s:.1f} s'}", file=sys.stderr, flush=True)
        reports += compile_kernels(topology, cases, threads=config.threads, progress=tell)
    if not config.json:
        print_table(reports, config.chip)
    if config.markdown is not None:
        command = " ".join(["jaxllm kernels", *(f"--chip {chip}" for chip in config.chip), *(["--every"] if config.every else [])])
        write_markdown(Path(config.markdown), command, markdown(reports, config.chip, every=config.every))
    failed = [r for r in reports if r.problem]
    if failed:
        first = f"{failed[0].case} for {failed[0].chip}: {failed[0].problem}"
        raise KernelsError(f"{len(failed)} of {len(reports)} did not compile as they should, the first {first}")
    return {"compiled": len(reports), "kernels": [asdict(r) for r in reports]}
