"""Policies compared."""

import json

import pytest

from jaxllm.launch.__main__ import main
from jaxllm.simulation.study import Case, judge


def test_the_command(capfd):
    flags = ["--workload", "alpaca", "--batch-sizes", "8", "--loads", "1.1", "--seeds", "2", "--num-requests", "300"]
    assert main(["study", *flags, "--policy", "fcfs,adaptive,srpt", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    (case,) = result["cases"]
    jct = {name: f["mean_jct_s"] for name, f in case["policies"].items()}
    normalized = {name: f["mean_normalized_latency_s"] for name, f in case["policies"].items()}
    assert jct["srpt"] < jct["adaptive"] < 1.02 * jct["fcfs"] and normalized["adaptive"] < normalized["fcfs"]
    assert main(["study", "--policy", "adaptive"]) == 2


def test_judging():
    of = lambda jct, p99, normalized: {"mean_jct_s": jct, "p99_jct_s": p99, "mean_normalized_latency_s": normalized}
    case = Case("w", 16, 1.1, {"fcfs": of(10, 50, 1.0), "hrrn": of(8, 60, 0.9), "adaptive": of(8, 54, 0.6), "srpt": of(5, 70, 0.2)})
    judged = judge(case)
    assert {name: good for name, (_, good) in judged.items()} == {
        "jct_by_best": True,
        "p99_jct_by_fcfs": True,
        "fcfs_jct_by_it": False,
        "fcfs_normalized_by_it": False,
    }
    assert judged["fcfs_jct_by_it"][0] == pytest.approx(1.25) and case.ratio("adaptive", "mean_jct_s", to="srpt") == pytest.approx(1.6)
