"""What our programs cost on TPUs, held to what they cost when this was written: a copy of the cache, a wider read, another collective
fails here, before anyone pays for it. Compiled by the TPU's own compiler, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiled_for
import pytest

from jaxllm.planning.kernels import KernelCase, some_cases

REPOSITORY = Path(__file__).parents[2]
# Bytes moved over the least that must be, and MiB of temporaries: with libtpu 0.0.50.1. A prefill's kernel says what it would move with
# a cache as full as there is room for, hence its times.
STEPS = {
    "v5e:2x4": {
        "llama-3-8b": {"decode": (1.011, 2.3), "prefill": (2.563, 2.7)},
        "qwen2-0.5b": {"decode": (1.016, 2.5), "prefill": (2.313, 2.5)},
        "gemma2-2b": {"decode": (1.016, 2.5), "prefill": (1.582, 2.5)},
    },
    "v6e:2x2": {
        "llama-3-8b": {"decode": (1.019, 41.9), "prefill": (3.088, 41.9)},
        "qwen2-0.5b": {"decode": (1.016, 2.9), "prefill": (2.313, 2.9)},
        "gemma2-2b": {"decode": (1.020, 2.9), "prefill": (1.618, 4.3)},
    },
}
SHAPES = {"llama-3-8b": (32, 4096), "qwen2-0.5b": (24, 896), "gemma2-2b": (26, 2304)}  # layers, hidden features
KERNELS_MIB = (129.3, 72.8, 66.4, 193.9, 258.2, 17.9, 21.8, 40.1, 38.6)  # moved by each of compiled_for.KERNELS, on either chip
MIB = 2**20


@pytest.fixture(scope="module", params=["v5e:2x4", "v6e:2x2"])
def compiled(request):
    """(topology, what compiled_for.py tells of it)"""
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, compiled_for.__file__, request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout.splitlines()[-1])


def test_kernels(compiled):
    reports = compiled[1]["kernels"]
    assert [KernelCase(**report["case"]) for report in reports] == compiled_for.KERNELS
    for report, moved in zip(reports, KERNELS_MIB, strict=True):
        assert report["problem"] is None and report["implementation"] == "tpu", report
        assert report["temporaries"] <= 0.75 * MIB, report  # the cache is 256 MiB
        assert 0.95 * moved <= report["bytes_moved"] / MIB <= 1.02 * moved, report


def test_every_feature_is_compiled():
    for field in KernelCase.__dataclass_fields__:
        if field not in ("heads", "kv_heads"):
            assert {getattr(case, field) for case in compiled_for.KERNELS} == {getattr(case, field) for case in some_cases()}, field


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", SHAPES)
def test_steps_move_and_hold_no_more_than_they_did(compiled, model, which):
    topology, found = compiled
    step, (times, temporaries) = found["steps"][model][which], STEPS[topology][model][which]
    assert 1.0 <= step["bytes_moved"] / step["bytes_minimum"] <= 1.01 * times
    assert step["temporaries"] / MIB <= 1.1 * temporaries + 0.1


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("model", SHAPES)
def test_collectives_are_two_a_layer_and_those_of_the_ends(compiled, model, which):
    plan = compiled[1]["steps"][model]
    layers, features = SHAPES[model]
    after_attention = after_mlp = layers
    of_embeddings = 1  # each chip has some rows of the table
    sums = after_attention + after_mlp + of_embeddings
    likeliest = 2  # each chip has the logits of some tokens: the largest of each, and whose it is
    rows, chips = plan["settings"]["max_num_seqs"], plan["settings"]["tensor"]
    assert [(c["kind"], c["count"], c["bytes"]) for c in plan[which]["collectives"]] == [
        ("all-gather", likeliest, likeliest * chips * rows * 4),
        ("all-reduce", sums, sums * plan[which]["tokens"] * features * 2),
    ]


def test_llama_3_8b_is_close_to_the_least_that_it_can_cost(compiled):
    plan = compiled[1]["steps"]["llama-3-8b"]
    held, decode, tensor = plan["per_chip_bytes"], plan["decode"], plan["settings"]["tensor"]
    assert plan["fits"] and plan["max_sequences"] >= 64
    assert held["parameters"] == pytest.approx(8.03e9 * 2 / tensor, rel=0.01)
    assert held["kv_cache"] == pytest.approx(64 * 2048 * 32 * 2 * 8 * 128 * 2 / tensor, rel=0.01)
    assert decode["temporaries"] <= 0.02 * (held["parameters"] + held["kv_cache"])  # no second copy of the cache
    assert decode["bytes_moved"] / decode["bytes_minimum"] <= 1.10
    assert 0.5 < decode["compiler_s"] / decode["bound_s"] < 10  # a wrong clock, or a loop counted once, is not
