"""Pictures of a run, from its metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError
from jaxllm.pictures import make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_APART = ("step", "tokens", "skipped_steps")  # what only counts up


def plot_run(run: str | Path) -> "Figure":
    """A matplotlib figure of what a run told, a panel for each number (the training and the evaluation of one share theirs):
    `plot_run("runs/first").savefig("first.png")`; a notebook shows it. Raises ConfigError for a folder without metrics."""
    lines = read_metrics(run)
    names = list(dict.fromkeys(name.removeprefix("eval_") for line in lines for name in line if name not in _APART))
    panels = [(name, [part for n in (name, f"eval_{name}") if (part := _series(lines, n))[0]]) for name in names]
    panels = [(name, parts) for name, parts in panels if parts]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = make_figure(4.5 * columns, 3 * rows)
    for i, (name, parts) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for steps, values, label in parts:
            axes.plot(steps, values, marker="o" if label.startswith("eval_") or len(steps) == 1 else None, markersize=3, label=label)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(parts) > 1:
            axes.legend()
    figure.suptitle(Path(run).name)
    return figure


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that was cut short is left out. Raises ConfigError if there are none."""
    file = Path(run).expanduser() / "metrics.jsonl"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): name the output_dir of a training run") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # being written
            continue
    if not lines:
        raise ConfigError(f"{file} has no line yet: the first comes after logging_steps steps")
    return lines


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float], str]:
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found], name
