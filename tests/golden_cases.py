"""The model goldens: tiny checkpoints made by transformers, and what transformers computed with them."""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "goldens"
MODELS = FOLDER / "models"
CASES = sorted(path.parent.name for path in MODELS.glob("*/golden.npz"))
OLD_CONFIGS = sorted(path.parent.name for path in MODELS.glob("*/config.old.json"))
LENGTH = 72  # of the longest prompt and its 32 greedy tokens


def golden(case: str) -> list[dict[str, np.ndarray]]:
    """For each prompt: `prompt` [T], `logits` [T, V] and `greedy` [32]."""
    with np.load(MODELS / case / "golden.npz") as data:
        return [{name: data[f"{name}_{i}"] for name in ("prompt", "logits", "greedy")} for i in range(3)]


def generated(case: str) -> list[list[int]]:
    """The 32 tokens that transformers' `generate` gives for each prompt: LongRoPE computes all anew where it switches."""
    with np.load(MODELS / case / "golden.npz") as data:
        name = "recomputed_greedy" if case == "phi3_longrope" else "greedy"
        return [data[f"{name}_{i}"].tolist() for i in range(3)]


def demo() -> dict:
    return json.loads((FOLDER / "demo.json").read_text())
