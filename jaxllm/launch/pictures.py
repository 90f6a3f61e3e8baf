"""Writing figures."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", file: str | Path, *, flag: str) -> Path:
    """Writes it, in the format of the name's ending; an error names the flag that gave the file."""
    out = Path(file).expanduser()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise ConfigError(f"cannot write {out} ({error}): give another {flag}") from error
    return out
