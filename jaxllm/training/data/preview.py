"""The first batch as a person can check it: what is learned in colour, and what the padding wastes."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxllm.training.data.dataset import Dataset


def dry_run(dataset: Dataset, *, rows: int = 2, console: Console | None = None) -> dict[str, Any]:
    """Draws a first batch, prints it on `console` (None: prints nothing) and returns the same facts as plain values for JSON.

    The dataset is left where it was.
    """
    state = dataset.get_state()
    batch = next(dataset)
    counts, bad_records = dict(dataset.counts), list(dataset.bad_records)
    dataset.set_state(state)
    parts = batch if dataset.family == "preference" else {"": batch}
    shape = next(iter(parts.values()))["tokens"].shape
    slots = len(parts) * shape[0] * shape[1]
    used = sum(int((part["segment_ids"] > 0).sum()) for part in parts.values())
    learned = sum(int(part["weights"].sum()) for part in parts.values())
    report: dict[str, Any] = {
        "kinds": dataset.stream.kinds,
        "records": dataset.stream.lengths,
        "batch_shape": list(shape),
        "examples": sum(int(part["segment_ids"].max(axis=1).sum()) for part in parts.values()) // len(parts),
        "tokens": used,
        "learned_tokens": learned,
        "padding_waste": round(1 - used / slots, 4),
        "drawn": counts,
        "bad_records": bad_records,
        "rows": [],
    }
    for row in range(min(rows, shape[0])):
        for name, part in parts.items():
            for segment in range(1, int(part["segment_ids"][row].max()) + 1):
                report["rows"].append({"row": row, "part": name, "segment": segment, "spans": _spans(dataset, part, row, segment)})
    if console is not None:
        _print(report, console)
    return report


def _spans(dataset: Dataset, part: dict[str, np.ndarray], row: int, segment: int) -> list[dict[str, Any]]:
    """Runs of tokens that are learned or not. Token t+1 is learned where weight t is 1."""
    here = np.flatnonzero(part["segment_ids"][row] == segment)
    ids = part["tokens"][row, here].tolist()
    learned = [False, *(part["weights"][row, here[:-1]] > 0).tolist()]
    spans: list[dict[str, Any]] = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or learned[i] != learned[start]:
            text = dataset.tokenizer.decode(ids[start:i], skip_special_tokens=False)
            spans.append({"learned": learned[start], "tokens": i - start, "text": text})
            start = i
    return spans


def _print(report: dict[str, Any], console: Console) -> None:
    console.print(f"records: {', '.join(f'{n} ({k})' for n, k in zip(report['records'], report['kinds'], strict=True))}", highlight=False)
    heading = None
    for entry in report["rows"]:
        if heading != (entry["row"], entry["part"]):
            heading = (entry["row"], entry["part"])
            console.rule(f"row {entry['row']} {entry['part']}".rstrip())
        text = Text(f"[{entry['segment']}] ", style="bold")
        for span in entry["spans"]:
            text.append(span["text"], style="black on green" if span["learned"] else "dim")
        console.print(text, highlight=False)
    console.rule()
    shape = " x ".join(map(str, report["batch_shape"]))
    console.print(
        f"first batch: {shape}, {report['examples']} examples, {report['tokens']} tokens, {report['learned_tokens']} of them learned "
        f"(green), {report['padding_waste']:.1%} padding",
        highlight=False,
    )
    shown = ("records", "examples", "tokens", "learned")
    left_out = {name: count for name, count in report["drawn"].items() if count and name not in shown}
    if left_out:
        console.print("drawn records: " + ", ".join(f"{count} {name}" for name, count in left_out.items()), highlight=False)
    for message in report["bad_records"]:
        console.print(Text(f"bad record: {message}", style="red"))
