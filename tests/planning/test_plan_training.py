"""Optimiser steps of runs that are planned for TPUs that are not here."""

from pathlib import Path

import pytest
from test_plan import MODELS, plan

RECIPES = Path(__file__).parents[2] / "configs" / "train"


def test_lora_of_an_8b_model_takes_half_the_memory_that_others_do():
    """Tunix 0.1.7's step of this work, compiled in the same way: 10.0 GiB of temporaries, 201 TFLOP a chip."""
    pytest.importorskip("libtpu")
    result = plan("--train", RECIPES / "llama3_8b_lora.yaml", "--topology", "v5e:2x2", "--optimization-level", "O1")
    held, step = result["per_chip_bytes"], result["step"]
    assert result["fits"] and result["settings"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 8.03e9 * 2 / 4 <= held["parameters"] <= 8.03e9 * 2 / 4 + 42e6 * 4  # of the adapter, some is whole on each
    assert held["optimizer"] <= 2 * 42e6 * 4
    assert held["temporaries"] <= 5 * 2**30
    assert step["flops_minimum"] <= step["flops"] <= 201e12
    assert step["bytes_moved"] <= 450 * 2**30
    gathered = sum(c["bytes"] for c in step["collectives"] if c["kind"] == "all-gather")
    assert gathered <= 2.2 * 8.03e9 * 2  # each layer twice, the head once: no chunk of the loss gathers it anew


def test_a_run_that_does_not_fit_is_told_how_it_could():
    pytest.importorskip("libtpu")
    model = ("--model", MODELS / "qwen3-0.6b.yaml")
    result = plan("--train", RECIPES / "llama3_8b_full.yaml", "--topology", "v5e:1x1", "--batch-size", 1, "--optimization-level", "O1")
    assert not result["fits"] and "lora" in result["remedy"]
    refused = plan("--train", RECIPES / "llama3_8b_full.yaml", *model, "--topology", "v5e:2x2", "--batch-size", 3)
    assert "batch_size=3 is no multiple" in refused["error"]["message"]
