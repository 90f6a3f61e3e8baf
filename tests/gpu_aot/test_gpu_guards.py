"""What our programs cost on GPUs, held to what they cost when this was written, as tests/planning/test_guards.py does for TPUs: kernels,
and decode and prefill of the same three models. Compiled by CUDA's own compiler, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
    pytest.skip("jax's CUDA plugin is not installed: make test-gpu-aot", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]
# Bytes moved over the least that must be, and MiB of temporaries: with jaxlib 0.12.0. A prefill's kernel says what it would move with a
# cache as full as there is room for, hence its times.
STEPS = {
    "llama-3-8b": {"decode": (1.394, 55.1), "prefill": (10.437, 88.5)},
    "qwen2-0.5b": {"decode": (1.091, 14.4), "prefill": (3.074, 15.5)},
    "gemma2-2b": {"decode": (1.077, 74.6), "prefill": (2.541, 76.6)},
}
SHAPES = {"llama-3-8b": (32, 4096), "qwen2-0.5b": (24, 896), "gemma2-2b": (26, 2304)}  # layers, hidden features
# MiB moved and of temporaries, by each of compiled_for.KERNELS; decode's parts are temporaries.
KERNELS_MIB = (
    (130.3, 1.1), (63.1, 0.2), (52.5, 5.7), (146.0, 0.9), (261.0, 2.1), (8.5, 0.2), (18.3, 0.4), (67.3, 0.4), (54.0, 1.6)
)  # fmt: skip
MIB = 2**20


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "tests/planning/compiled_for.py", "h100:8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels(compiled):
    for report, (moved, temporaries) in zip(compiled["kernels"], KERNELS_MIB, strict=True):
        assert report["problem"] is None and report["implementation"] == "gpu", report
        assert report["temporaries"] / MIB <= 1.1 * temporaries + 0.1, report  # the cache is 256 MiB
        assert 0.95 * moved <= report["bytes_moved"] / MIB <= 1.02 * moved, report


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", STEPS)
def test_steps_move_and_hold_no_more_than_they_did(compiled, model, which):
    step, (times, temporaries) = compiled["steps"][model][which], STEPS[model][which]
    assert 1.0 <= step["bytes_moved"] / step["bytes_minimum"] <= 1.01 * times
    assert step["temporaries"] / MIB <= 1.1 * temporaries + 0.1


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", STEPS)
def test_collectives_are_two_a_layer_and_those_of_the_ends(compiled, model, which):
    plan = compiled["steps"][model]
    layers, features = SHAPES[model]
    sums = 2 * layers + 1  # and that of the embeddings
    rows, chips = plan["settings"]["max_num_seqs"], plan["settings"]["tensor"]
    assert [(c["kind"], c["count"], c["bytes"]) for c in plan[which]["collectives"]] == [
        ("all-gather", 1, chips * rows * 4),  # of the likeliest logits, and whose they are, at once
        ("all-reduce", sums, sums * plan[which]["tokens"] * features * 2),
    ]
