"""Plans as pictures."""

from typing import TYPE_CHECKING

from jaxllm.pictures import make_figure
from jaxllm.planning.serving import ServingPlan
from jaxllm.planning.training import TrainingPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB = 2**30


def plot_plan(plan: ServingPlan | TrainingPlan, title: str = "") -> "Figure":
    """A matplotlib figure of a plan: each step under the chip's roofline (Williams et al., CACM 52(4), 2009), a dot where the bound puts it
    and a cross where the compiler's estimate does; and what a chip's memory holds. Raises ConfigError without matplotlib."""
    figure = make_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    _roofline(left, plan)
    _memory(right, plan.per_chip_bytes)
    figure.suptitle(title)
    return figure


def _roofline(axes: "Axes", plan: ServingPlan | TrainingPlan) -> None:
    name, bandwidth, peak = (plan.settings[key] for key in ("chip", "bandwidth", "peak_flops"))
    names = ("decode", "prefill") if isinstance(plan, ServingPlan) else ("step",)
    steps = {name: step for name in names if (step := getattr(plan, name)) is not None}
    ridge = peak / bandwidth  # operations a byte at which the two bounds meet
    ends = [ridge, *(step.flops / step.bytes_moved for step in steps.values())]
    low, high = min(ends) / 4, max(ends) * 4
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black", label=name)
    for which, step in steps.items():
        at = step.flops / step.bytes_moved
        (dot,) = axes.plot(at, step.flops / step.bound_s / 1e12, "o", label=f"{which}, {1e3 * step.bound_s:.3g} ms at least")
        if step.compiler_s is not None:
            estimate = f"the compiler's estimate, {1e3 * step.compiler_s:.3g} ms"
            axes.plot(at, step.flops / step.compiler_s / 1e12, "x", color=dot.get_color(), label=estimate)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="T operations a second, of a chip")
    axes.grid(alpha=0.3)
    axes.legend()


def _memory(axes: "Axes", per_chip: dict[str, int]) -> None:
    """A bar of what is held, the free part on top; a line where the chip ends."""
    held = {name: size for name, size in per_chip.items() if name not in ("total", "capacity")}
    free = max(0, per_chip["capacity"] - per_chip["total"])
    bottom = 0.0
    for name, size in (*held.items(), ("free", free)):
        axes.bar(0, size / _GIB, bottom=bottom, width=0.6, label=name.replace("_", " "), color="none" if name == "free" else None)
        bottom += size / _GIB
    axes.axhline(per_chip["capacity"] / _GIB, color="black", linestyle="--")
    axes.set(xlim=(-0.5, 1.5), xticks=[], ylabel="GiB of a chip")
    axes.legend(loc="center right", fontsize="small")
