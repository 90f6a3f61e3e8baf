"""Policies compared."""

import json

import numpy as np
import pytest

from jaxllm.launch.__main__ import main
from jaxllm.simulation import MACHINES, Arrivals, CostModel, Trace, draw_workload, figures, limits_of, simulate
from jaxllm.simulation.bounds import least_jct
from jaxllm.simulation.study import Case, judge, markdown

FLAGS = ["study", "--workload", "alpaca", "--batch-sizes", "8", "--loads", "1.1", "--seeds", "2", "--json"]


def test_the_command(capfd):
    assert main([*FLAGS, "--num-requests", "300", "--policy", "fcfs,adaptive,srpt"]) == 0
    result = json.loads(capfd.readouterr().out)
    (case,) = result["cases"]
    jct = {name: f["mean_jct_s"] for name, f in case["policies"].items()}
    normalized = {name: f["mean_normalized_latency_s"] for name, f in case["policies"].items()}
    assert case["least_jct_s"] < jct["srpt"] < jct["adaptive"] < 1.02 * jct["fcfs"] and normalized["adaptive"] < normalized["fcfs"]
    assert main(["study", "--policy", "adaptive"]) == 2
    assert main(["study", "--workload", "lisp"]) == main(["study", "--keep", "runs.txt"]) == 2


def test_a_study_goes_on_where_it_was_broken_off(tmp_path, capfd):
    kept, table = tmp_path / "runs.jsonl", tmp_path / "study.md"
    flags = [*FLAGS, "--num-requests", "40", "--keep", str(kept)]
    assert main([*flags, "--policy", "fcfs"]) == 0
    capfd.readouterr()
    before = kept.read_text(encoding="utf-8").splitlines()
    assert len(before) == 2 * 3  # of each seed: the most that fcfs serves, fcfs, the least
    both = [*flags, "--policy", "fcfs,adaptive", "--table", str(table)]
    outputs = []
    for processes in ("2", "1"):
        assert main([*both, "--processes", processes]) == 0
        outputs.append(capfd.readouterr().out)
        lines = kept.read_text(encoding="utf-8").splitlines()
        assert lines[:6] == before and len(lines) == 8
    assert outputs[0] == outputs[1]
    kept.unlink()
    assert main(both) == 0 and capfd.readouterr().out == outputs[0], "in this process, the same"
    assert table.read_text(encoding="utf-8").count("\n") == 3
    kept.write_text("not a result\n", encoding="utf-8")
    assert main(both) != 0 and "line 1" in capfd.readouterr().err


def test_judging():
    of = lambda jct, p99, normalized: {"mean_jct_s": jct, "p99_jct_s": p99, "mean_normalized_latency_s": normalized}
    figures = {"fcfs": of(10, 50, 1.0), "hrrn": of(8, 60, 0.9), "adaptive": of(8, 54, 0.6), "srpt": of(5, 70, 0.2)}
    case = Case("w", 16, 1.1, figures, 4.0)
    judged = judge(case)
    assert {name: good for name, (_, good) in judged.items()} == {
        "jct_by_best": True,
        "p99_jct_by_fcfs": True,
        "fcfs_jct_by_it": False,
        "fcfs_normalized_by_it": False,
    }
    assert judged["fcfs_jct_by_it"][0] == pytest.approx(1.25) and case.ratio("adaptive", "mean_jct_s", to="srpt") == pytest.approx(1.6)
    rows = markdown([case]).splitlines()
    assert rows[0] == "| | at a time | load | `hrrn` | `adaptive` | `srpt` | least JCT |"
    assert rows[2] == "| w | 16 | 110% | 0.80 1.20 0.90 | 0.80 **1.08** 0.60 | 0.50 1.40 0.20 | 0.40 |"


def test_no_policy_is_below_the_least():
    """By hand: one at a time, the short first, alone. Then drawn requests under the oracle, with room for all."""
    machine = CostModel(step_s=1.0, token_s=1e-3, kv_tokens=1000, kv_token_bytes=1)
    two = Trace(np.zeros(2), np.array([1, 1]), np.array([10, 30]))
    assert least_jct(two, machine, 1) == pytest.approx((10 + 40) / 2, rel=1e-3)
    assert least_jct(two, machine, 2) == pytest.approx((10 + 30) / 2, rel=1e-3), "side by side"
    shared = Trace(np.zeros(2), np.array([512, 512]), np.array([1, 1]), blocks=[[7], [7]])
    apart = Trace(np.zeros(2), np.array([512, 512]), np.array([1, 1]), blocks=[[7], [8]])
    slow = CostModel(step_s=0.01, token_s=1.0, kv_tokens=2000, kv_token_bytes=1)
    assert least_jct(shared, slow, 2) < 3 and least_jct(apart, slow, 2) > 500
    for outputs in (1, 4, 20):  # the first token comes with the prompt's end
        lone = Trace(np.array([0.0, 1000.0]), np.array([222, 222]), np.array([outputs, outputs]))
        settings = limits_of(MACHINES["opt-13b/a100"], max_num_seqs=16, max_num_batched_tokens=512, page_size=16, policy="fcfs")
        served = figures(simulate(lone, MACHINES["opt-13b/a100"], *settings))["mean_jct_s"]
        assert 0.7 * served < least_jct(lone, MACHINES["opt-13b/a100"], 16) <= served
    for name, load in (("alpaca", 8.0), ("sharegpt", 1.2)):
        trace, cost = draw_workload(name, 150, Arrivals(load), seed=3, max_model_len=2048), MACHINES["opt-13b/a100"]
        settings = limits_of(cost, max_num_seqs=16, max_num_batched_tokens=512, page_size=16, policy="srpt")
        best = figures(simulate(trace, cost, *settings, tell_lengths=True))["mean_jct_s"]
        assert 0.3 * best < least_jct(trace, cost, 16) < best
