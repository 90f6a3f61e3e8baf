"""Profiles of a machine, and traces on the real engine."""

import json

import numpy as np
import pytest
from golden_cases import MODELS

from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.serving.scheduler import StepPlan
from jaxllm.simulation import CostModel, Trace, cost_model
from jaxllm.simulation.profile import Step, fit

LIMITS = {"max-num-seqs": 4, "max-num-batched-tokens": 32, "max-model-len": 96, "num-pages": 30}
MODEL = ["--model", str(MODELS / "llama_gqa"), *(word for name, n in LIMITS.items() for word in (f"--{name}", str(n)))]


def test_a_fit_finds_what_the_steps_are_made_of():
    rng, shapes = np.random.default_rng(0), {"decode 4": 0.02, "decode 8": 0.025, "mixed 32": 0.05, "mixed 128": 0.2}
    steps = []
    for _ in range(300):
        shape = rng.choice(list(shapes))
        context, pairs = int(rng.integers(10, 3000)), int(rng.integers(0, 50_000)) if shape.startswith("mixed") else 0
        seconds = shapes[shape] + 1e-5 * context + 2e-6 * pairs
        steps.append(Step(shape, context, pairs, seconds * (5.0 if rng.random() < 0.03 else rng.uniform(0.98, 1.02))))
    found = fit(steps)
    assert found["shapes"] == pytest.approx(shapes, rel=0.05)
    assert found["context_token_s"] == pytest.approx(1e-5, rel=0.05) and found["attend_pair_s"] == pytest.approx(2e-6, rel=0.05)
    with pytest.raises(ConfigError, match="too few"):
        fit(steps[:5])


def test_a_step_takes_the_shape_that_has_room_for_it():
    cost = CostModel(step_s=1.0, token_s=1.0, kv_tokens=64, kv_token_bytes=8, shapes={"decode 2": 0.1, "decode 8": 0.3, "mixed 16": 0.5})
    seconds = lambda tokens, decode: cost._base(tokens, decode)
    assert [seconds(n, True) for n in (1, 2, 3, 8)] == [0.1, 0.1, 0.3, 0.3]
    assert seconds(16, False) == 0.5 and seconds(32, False) == 1.0, "beyond the largest, in proportion"
    assert cost.seconds(StepPlan((), 0, 0)) == 0.1
    for shapes in ({"decode 2": 0.1}, {"decode 2": 0.1, "mixed x": 1.0}, {"decode 2": 0.0, "mixed 2": 1.0}):
        with pytest.raises(ConfigError, match="shapes"):
            CostModel(step_s=1.0, token_s=1.0, kv_tokens=64, kv_token_bytes=8, shapes=shapes)


def test_a_profile_and_a_replay(tmp_path, capfd):
    """A machine is measured, a trace with a common beginning is served, with host memory, and simulated."""
    machine, trace = tmp_path / "machine.json", tmp_path / "trace.jsonl"
    assert main(["bench", "profile", *MODEL, "--longest", "40", "--repeats", "1", "--out", str(machine), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["shapes"]) == {"decode 2", "decode 4", "mixed 16", "mixed 32"} and result["steps"] > 50
    assert cost_model(str(machine)).shapes == result["shapes"] and result["host_bandwidth"] > 1e6
    rows = [{"timestamp": 10 * i, "input_length": 1024 + 64 * i, "output_length": 200, "hash_ids": [7, 8]} for i in range(28)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--trace", str(trace), "--scale", "0.03125", "--policy", "fcfs,hrrn", "--machine", str(machine), "--speedup", "2"]
    assert main(["bench", "replay", *MODEL, *flags, "--host-kv-bytes", "1000000", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(result["policies"]) == set(result["simulated"]) == {"fcfs", "hrrn"} and result["requests"] == 28
    for name, measured in result["policies"].items():
        simulated = result["simulated"][name]
        assert set(simulated) <= set(measured) and measured["compiles_after_warmup"] == 0
        assert 0 < measured["mean_ttft_s"] < measured["mean_jct_s"] <= measured["p99_jct_s"]
        assert 0.7 < measured["cached_tokens"] / simulated["cached_tokens"] < 1.4, "32 tokens are common to all"
        assert 0.1 < measured["mean_jct_s"] / simulated["mean_jct_s"] < 30, "this machine may be busy"
        assert measured["swapped_out_bytes"] > 0 and 0 <= measured["exposed_swap_s"] <= measured["swap_s"] < measured["makespan_s"]


def test_refusals(tmp_path):
    for flags in (["--workload", "alpaca", "--speedup", "2"], ["--rate", "1"], ["--trace", "a.csv", "--rate", "1", "--speedup", "2"]):
        assert main(["bench", "replay", "--model", "x", *flags]) == 2
    assert main(["bench", "profile", "--model", "x", "--out", str(tmp_path / "no" / "a.json")]) == 2
    assert main(["bench", "profile", "--model", "x", "--longest", "4000"]) == 2
    short = Trace(np.zeros(2), np.array([10, 1]), np.array([3, 9]), block=512).scaled(0.25)
    assert short.prompts.tolist() == [2, 1] and short.outputs.tolist() == [1, 2] and short.block == 128
