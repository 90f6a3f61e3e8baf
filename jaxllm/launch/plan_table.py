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
    s = plan.settings
    if s["chip"] == "cpu":
        speed = f"{s['bandwidth'] / 1e9:.0f} GB/s and {s['peak_flops'] / 1e9:.0f} G operations a second"
        console.print(f"{title}, {s['dtype']}; products of matrices were measured at {speed}")
    else:
        console.print(f"{title}, {s['tensor']} chips to a layer")
    console.print(_memory(plan.per_chip_bytes, "memory" if s["chip"] == "cpu" else "memory of a chip"))
    steps = Table("a step", *(name for name in ("decode", "prefill") if getattr(plan, name) is not None))
    told = [_facts(step) for step in (plan.decode, plan.prefill) if step is not None]
    for rows in zip(*(facts.items() for facts in told), strict=True):
        steps.add_row(rows[0][0], *(value for _, value in rows))
    console.print(steps)
    room = f"fits, with room for {plan.max_sequences:,} sequences of {s['max_model_len']:,} tokens"
    room += f", or {s['max_num_seqs']:,} of {plan.max_context:,}"
    if s["chip"] == "cpu":
        room += f" (the engine's own choice is {(s['num_pages'] - 1) * s['page_size']:,} tokens in all: more with --num-pages)"
    console.print(f"{room if plan.fits else 'does NOT fit'}; compiled in {plan.compile_s:.1f} s")
    if plan.remedy:
        console.print(f"remedy: {plan.remedy}")


def _facts(step: StepReport) -> dict[str, str]:
    return {
        "tokens": str(step.tokens),
        "moved": gib(step.bytes_moved),
        "least": gib(step.bytes_minimum),
        "moved / least": f"{step.bytes_moved / step.bytes_minimum:.2f}",
        "operations": f"{step.flops / 1e12:.3f} T" if step.flops >= 1e11 else f"{step.flops / 1e9:.2f} G",
        "bound": f"{1e3 * step.bound_s:.2f} ms",
        "compiler's estimate": _estimate(step.compiler_s),
        "tokens/s at most": f"{step.tokens_per_s:,.0f}",
        "collectives": _told(step.collectives),
    }


def print_training_plan(title: str, plan: TrainingPlan) -> None:
    console, s = Console(), plan.settings
    mesh = ", ".join(f"{name} {size}" for name, size in s["mesh"].items() if size > 1) or "one chip"
    tuned = "all of the model" if s["adapter"] is None else s["adapter"] + (f" on {s['quantize_base']}" if s["quantize_base"] else "")
    console.print(f"{title}: {tuned}, {s['batch_size']} x {s['max_length']} tokens, {s['precision']}, remat {s['remat']}, {mesh}")
    console.print(_memory(plan.per_chip_bytes, "memory of a chip"))
    if (step := plan.step) is not None:
        table = Table()
        for name in ("moved", "operations", "least", "bound", "compiler", "tokens/s at most", "MFU at most", "collectives"):
            table.add_column(name, justify="left" if name == "collectives" else "right")
        operations = (f"{step.flops / 1e12:.1f} T", f"{step.flops_minimum / 1e12:.1f} T")
        speed = (f"{step.bound_s:.3f} s", _estimate(step.compiler_s), f"{step.tokens_per_s:,.0f}", f"{step.mfu_bound:.0%}")
        table.add_row(gib(step.bytes_moved), *operations, *speed, _told(step.collectives))
        console.print(table)
    console.print(f"{'fits' if plan.fits else 'does NOT fit'}; compiled in {plan.compile_s:.1f} s")
    if plan.remedy:
        console.print(f"remedy: {plan.remedy}")


def _estimate(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1e3 * seconds:.2f} ms"


def gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.2f} GiB"


def _memory(per_chip: dict[str, int], title: str) -> Table:
    table = Table()
    table.add_column(title)
    table.add_column("bytes", justify="right")
    for name, size in per_chip.items():
        table.add_row(name.replace("_", " "), gib(size))
    return table


def _told(collectives: list[Collective]) -> str:
    return ", ".join(f"{c.count} {c.kind}" for c in collectives if c.bytes >= 2**20) or "none of a MiB"
