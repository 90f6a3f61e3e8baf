"""`jaxllm plot`: draw what a training run told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Draw the losses, rates and speed of a training run, finished or not, as a PNG.

    Example:

      jaxllm plot --run runs/first
    """

    run: str
    "The output_dir of a training run."
    out: str | None = None
    "The picture to write; by default metrics.png in the run's folder."


def run(config: Config) -> dict[str, Any]:
    from jaxllm.training import plot_run

    figure, out = plot_run(config.run), Path(config.out or Path(config.run) / "metrics.png").expanduser()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise ConfigError(f"cannot write {out} ({error}): give another --out") from error
    print(f"wrote {out}", file=sys.stderr)
    return {"path": str(out), "panels": len(figure.axes)}
