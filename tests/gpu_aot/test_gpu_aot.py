"""Compiled for GPUs that are not here, by CUDA's own compiler: `make test-gpu-aot`, in an environment with jax's CUDA plugin."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.planning import find_topology
from jaxllm.planning.kernels import KernelCase, compile_kernels, some_cases

if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
    pytest.skip("jax's CUDA plugin is not installed: make test-gpu-aot", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]


def problems(topology, cases):
    return {f"{r.chip}: {r.case}": r.problem for r in compile_kernels(find_topology(topology), cases) if r.problem}


def test_every_kernel_compiles_for_h100():
    assert problems("h100:1", some_cases()) == {}


@pytest.mark.parametrize("gpu", ["a100", "l4", "h200", "b200"])
def test_the_kernels_that_need_most_compile_for_others(gpu):
    cases = [KernelCase(head_dim=d, window=1000, softcap=30.0, sinks=True) for d in (80, 128, 256)]
    assert problems(f"{gpu}:1", [*cases, KernelCase(dtype="float32", head_dim=256), KernelCase(heads=71, kv_heads=1)]) == {}


@pytest.mark.parametrize("gpus,times", [(1, 1.35), (2, 1.2)])  # of eight: test_gpu_guards.py
def test_llama_3_8b(gpus, times):
    """As on TPUs: no second copy of the cache, two all-reduces a layer, and not much more moved than must be."""
    command = [sys.executable, "-m", "jaxllm.launch", "plan", "--model", "configs/models/llama-3-8b.yaml", "--topology", f"h100:{gpus}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"]
    held, decode = result["per_chip_bytes"], result["decode"]
    assert held["parameters"] == pytest.approx(8.03e9 * 2 / gpus, rel=0.01)
    assert decode["temporaries"] <= 0.1 * held["kv_cache"] + 300e6  # the logits of a step are in it
    assert 1.0 <= decode["bytes_moved"] / decode["bytes_minimum"] <= times
    layers = [c["count"] for c in decode["collectives"] if c["kind"] == "all-reduce"]
    assert layers == ([65] if gpus > 1 else [])
