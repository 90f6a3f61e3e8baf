"""Plans as tables, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from jaxllm.planning import ServingPlan, StepReport
    from jaxllm.planning.hlo import Collective
    from jaxllm.planning.training import TrainingPlan


def print_serving_plan(title: str, plan: ServingPlan) -> None:
    console = Console()
    console.print(f"{title}, {plan.settings['tensor']} chips to a layer")
    console.print(_memory(plan.per_chip_bytes, ("parameters", "kv_cache", "temporaries", "other", "total", "capacity")))
    steps = Table()
    for name in ("a step", "tokens", "moved", "least", "times least", "operations", "bound", "compiler", "tokens/s at most", "collectives"):
        steps.add_column(name, justify="left" if name in ("a step", "collectives") else "right")
    for name, step in (("decode", plan.decode), ("prefill", plan.prefill)):
        if step is not None:
            steps.add_row(name, *_row(step))
    console.print(steps)
    room = f"fits, with room for {plan.max_sequences} sequences of {plan.settings['max_model_len']} tokens"
    console.print(f"{room if plan.fits else 'does NOT fit'}; compiled in {plan.compile_s:.1f} s")
    if plan.remedy:
        console.print(f"remedy: {plan.remedy}")


def _row(step: StepReport) -> list[str]:
    return [
        str(step.tokens),
        gib(step.bytes_moved),
        gib(step.bytes_minimum),
        f"{step.bytes_moved / step.bytes_minimum:.2f}",
        f"{step.flops / 1e12:.3f} T",
        f"{1e3 * step.bound_s:.2f} ms",
        _seconds(step.compiler_s),
        f"{step.tokens_per_s:,.0f}",
        _told(step.collectives),
    ]


def print_training_plan(title: str, plan: TrainingPlan) -> None:
    console, s = Console(), plan.settings
    mesh = ", ".join(f"{name} {size}" for name, size in s["mesh"].items() if size > 1) or "one chip"
    tuned = "all of the model" if s["adapter"] is None else s["adapter"] + (f" on {s['quantize_base']}" if s["quantize_base"] else "")
    console.print(f"{title}: {tuned}, {s['batch_size']} x {s['max_length']} tokens, {s['precision']}, remat {s['remat']}, {mesh}")
    console.print(_memory(plan.per_chip_bytes, ("parameters", "optimizer", "temporaries", "other", "total", "capacity")))
    if (step := plan.step) is not None:
        table = Table()
        for name in ("moved", "operations", "least", "bound", "compiler", "tokens/s at most", "MFU at most", "collectives"):
            table.add_column(name, justify="left" if name == "collectives" else "right")
        operations = (f"{step.flops / 1e12:.1f} T", f"{step.flops_minimum / 1e12:.1f} T")
        speed = (f"{step.bound_s:.3f} s", _seconds(step.compiler_s), f"{step.tokens_per_s:,.0f}", f"{step.mfu_bound:.0%}")
        table.add_row(gib(step.bytes_moved), *operations, *speed, _told(step.collectives))
        console.print(table)
    console.print(f"{'fits' if plan.fits else 'does NOT fit'}; compiled in {plan.compile_s:.1f} s")
    if plan.remedy:
        console.print(f"remedy: {plan.remedy}")


def _seconds(estimate: float | None) -> str:
    return "no estimate" if estimate is None else f"{1e3 * estimate:.2f} ms"


def gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.2f} GiB"


def _memory(per_chip: dict[str, int], names: tuple[str, ...]) -> Table:
    table = Table()
    table.add_column("memory of a chip")
    table.add_column("bytes", justify="right")
    for name in names:
        table.add_row(name.replace("_", " "), gib(per_chip[name]))
    return table


def _told(collectives: list[Collective]) -> str:
    return ", ".join(f"{c.count} {c.kind}" for c in collectives if c.bytes >= 2**20) or "none of a MiB"
