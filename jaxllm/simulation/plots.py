"""Pictures of what was simulated. They need matplotlib (`pip install 'jaxllm[watch]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.pictures import make_figure
from jaxllm.simulation.sweep import LATENCY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxllm.serving.scheduler import StepPlan

_COLOURS = {"waits": "#e6e6e6", "prompt": "#f28e2b", "draws": "#4e79a7"}


class Timeline:
    """When each request waited, had its prompt computed, and drew tokens: `simulate(..., watch=timeline)`."""

    def __init__(self, requests: int):
        self.spans: list[list[tuple[float, float, str]]] = [[] for _ in range(requests)]

    def __call__(self, begin: float, end: float, plan: StepPlan) -> None:
        for s in plan.scheduled:
            if s.sequence.id >= len(self.spans):
                continue
            spans, kind = self.spans[s.sequence.id], "prompt" if s.count > 1 else "draws"
            if spans and spans[-1][2] == kind and spans[-1][1] >= begin - 1e-9:
                spans[-1] = (spans[-1][0], end, kind)
            else:
                spans.append((begin, end, kind))


def gantt(timelines: dict[str, Timeline], arrivals: Sequence[float]) -> Figure:
    """A row for each request, a panel for each policy: grey while it waits, orange while its prompt is computed, blue while it draws."""
    rows = max(len(t.spans) for t in timelines.values())
    figure = make_figure(9, (0.6 + 0.22 * rows) * len(timelines))
    last = max(span[1] for t in timelines.values() for spans in t.spans for span in spans)
    for i, (name, timeline) in enumerate(timelines.items()):
        axes = figure.add_subplot(len(timelines), 1, i + 1)
        for row, spans in enumerate(timeline.spans):
            if not spans:
                continue
            axes.broken_barh([(arrivals[row], spans[-1][1] - arrivals[row])], (row - 0.35, 0.7), color=_COLOURS["waits"])
            for kind in ("prompt", "draws"):
                bars = [(begin, end - begin) for begin, end, k in spans if k == kind]
                axes.broken_barh(bars, (row - 0.35, 0.7), color=_COLOURS[kind])
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(title=name, xlim=(0, last), ylim=(rows - 0.4, -0.6), ylabel="request")
    axes.set_xlabel("seconds (grey: waits, orange: prompt, blue: draws tokens)")
    return figure


def curves(panels: dict[str, tuple[Sequence[float], dict[str, Sequence[float]]]], figure_name: str = LATENCY) -> Figure:
    """Latency against load, a panel for each title -> (loads, label -> latencies)."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_figure(4.5 * columns, 3.2 * rows)
    for i, (title, (loads, lines)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for label, values in lines.items():
            axes.plot(loads, values, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="load, by what fcfs serves at most", ylabel=figure_name.replace("_", " ").removesuffix(" s") + ", s")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
