"""`jaxllm plot`: draw what a training run told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    from jaxllm.pictures import save_figure
    from jaxllm.training import plot_run

    figure = plot_run(config.run)
    out = save_figure(figure, config.out or Path(config.run) / "metrics.png", flag="--out")
    print(f"wrote {out}", file=sys.stderr)
    return {"path": str(out), "panels": len(figure.axes)}
