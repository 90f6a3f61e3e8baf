"""Figures for commands to write and for notebooks to show. They need matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MISSING = "plots need matplotlib: pip install 'jaxllm[watch]'"
_ENDINGS = (".png", ".svg", ".pdf")


def check_picture(file: str | None) -> None:
    """Before hours are spent on what a picture is to show: raises ConfigError if it could not be drawn to `file` (None: there is none)."""
    if file is None:
        return
    if not file.endswith(_ENDINGS) or not Path(file).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"plot={file}: give a file that ends in .png, .svg or .pdf, in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(_MISSING)


def make_figure(width: float, height: float) -> Figure:
    """An empty one, in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(_MISSING) from error
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
