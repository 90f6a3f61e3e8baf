"""Figures for commands to write and for notebooks to show. They need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> Figure:
    """An empty one, in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'jaxllm[watch]'") from error
    rcParams["svg.hashsalt"] = "jaxllm"  # the same picture is the same file
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: str | Path, *, flag: str = "--plot") -> Path:
    """Writes it, in the format of the name's ending; an error names the flag that gave the file."""
    out = Path(file).expanduser()
    try:
        # A date would make the same picture another file each time.
        figure.savefig(out, dpi=100, metadata={"Date": None} if out.suffix == ".svg" else None)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise ConfigError(f"cannot write {out} ({error}): give another {flag}") from error
    return out
