"""A plan as a picture: a roofline of its steps, and what a chip's memory holds."""

from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError
from jaxllm.planning.chips import CHIPS
from jaxllm.planning.serving import ServingPlan
from jaxllm.planning.training import TrainingPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIB = 2**30


def need_matplotlib() -> None:
    """Raises ConfigError where there is none; a plan takes a while, so it is asked first."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'jaxllm[watch]'") from error


def plot_plan(plan: ServingPlan | TrainingPlan) -> "Figure":
    """A matplotlib figure; a notebook shows it. Left, Williams et al.'s roofline (2009): operations a second that the bound and the
    compiler's estimate would be, over operations per byte. Right, GiB of a chip. Raises ConfigError without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    chip = CHIPS[plan.settings["chip"]]
    named = {"decode": plan.decode, "prefill": plan.prefill} if isinstance(plan, ServingPlan) else {"step": plan.step}
    steps = {name: step for name, step in named.items() if step is not None}
    figure = Figure(figsize=(11, 4), layout="constrained")
    roof, bar = figure.subplots(1, 2, width_ratios=(2, 1))

    ridge = chip.flops / chip.bandwidth
    at = {name: step.flops / step.bytes_moved for name, step in steps.items()}
    low, high = min([ridge, *at.values()]) / 4, max([ridge, *at.values()]) * 4
    roof.plot([low, ridge, high], [low * chip.bandwidth, chip.flops, chip.flops], color="black", label=f"{chip.name}: published")
    for name, step in steps.items():
        (point,) = roof.plot(at[name], step.flops / step.bound_s, "o", label=f"{name}: bound, {1e3 * step.bound_s:.2f} ms")
        if step.compiler_s is not None:
            label = f"{name}: the compiler's estimate, {1e3 * step.compiler_s:.2f} ms"
            roof.plot(at[name], step.flops / step.compiler_s, "x", color=point.get_color(), label=label)
    roof.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations a second, a chip")
    roof.legend(fontsize="small")

    held = {name: size for name, size in plan.per_chip_bytes.items() if name not in ("total", "capacity")}
    free = plan.per_chip_bytes["capacity"] - plan.per_chip_bytes["total"]
    below = 0.0
    for name, size in [*held.items(), ("free", max(0, free))]:
        label = f"{name.replace('_', ' ')}: {size / _GIB:.2f} GiB"
        bar.bar(0, size / _GIB, bottom=below, width=0.5, label=label, color="white" if name == "free" else None, edgecolor="black")
        below += size / _GIB
    bar.axhline(plan.per_chip_bytes["capacity"] / _GIB, color="red", linestyle="--", label="capacity")
    bar.set(xticks=[], xlim=(-0.4, 1.4), ylabel="GiB of a chip", title="fits" if plan.fits else "does not fit")
    bar.legend(fontsize="small", loc="center right")
    return figure
