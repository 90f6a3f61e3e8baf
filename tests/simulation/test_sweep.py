"""Loads at equal latency, and pictures."""

import json

import pytest

from jaxllm.launch.__main__ import main
from jaxllm.simulation.sweep import Sweep, gains


def test_loads_are_compared_at_equal_latency():
    of = lambda *latencies: [{"mean_normalized_latency_s": x} for x in latencies]
    result = Sweep(2.0, (1.0, 2.0, 4.0), {"fcfs": of(0.1, 0.2, 0.6), "mlfq": of(0.1, 0.15, 0.2)})
    assert result.rate_at("fcfs", 0.4) == pytest.approx(3) and result.rate_at("mlfq", 0.4) is None
    assert gains(result, "fcfs", [0.15, 0.2, 0.05]) == {"mlfq": [pytest.approx(2 / 1.5), pytest.approx(4 / 2), None]}


def test_mlfq_bears_more_load_than_fcfs_at_equal_normalized_latency(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.svg"
    flags = ["--workload", "alpaca", "--num-requests", "200", "--loads", "0.7,1.2,2,3", "--latencies-s", "0.08,0.15", "--max-num-seqs", "8"]
    assert main(["sweep", *flags, "--plot", str(out), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert all(ratio > 1.2 for ratio in result["load_by_fcfs"]["mlfq+proactive"])
    assert result["curves"]["fcfs"] == sorted(result["curves"]["fcfs"]) and out.read_text(encoding="utf-8").startswith("<?xml")
    for refused in (["--policy", "mlfq"], ["--policy", "fcfs,mlfq+proactiv"], ["--loads", "0"]):
        assert main(["sweep", *refused]) == 2
    assert "proactive" in capfd.readouterr().err


def test_pictures_of_simulate_and_study(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--workload", "alpaca", "--num-requests", "40", "--load", "1.2", "--max-num-seqs", "4"]
    gantt, curves = tmp_path / "gantt.png", tmp_path / "curves.png"
    assert main(["simulate", *flags, "--policy", "fcfs,mlfq", "--swap", "proactive", "--plot", str(gantt), "--json"]) == 0
    assert set(json.loads(capfd.readouterr().out)["policies"]) == {"fcfs", "mlfq"}
    small = ["--workload", "alpaca", "--num-requests", "40", "--batch-sizes", "4", "--loads", "0.9,1.2", "--seeds", "1"]
    assert main(["study", *small, "--policy", "fcfs,mlfq", "--plot", str(curves)]) == 0
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (gantt, curves))
    assert main(["simulate", *flags, "--plot", str(tmp_path / "none" / "a.png")]) == 2
    assert main(["simulate", *flags, "--swap", "later"]) == 2
