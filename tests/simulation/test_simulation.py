"""The simulator: traces, arrivals, the cost model, and the loop against one that takes each step for itself."""

import json

import numpy as np
import pytest

from jaxllm.errors import ConfigError, DataError
from jaxllm.launch.__main__ import main
from jaxllm.simulation import (
    MACHINES,
    Arrivals,
    Slo,
    Trace,
    cost_model,
    draw_arrivals,
    draw_workload,
    figures,
    limits_of,
    read_trace,
    simulate,
)

MACHINE = MACHINES["opt-13b/a100"]
LIMITS = dict(max_num_seqs=8, max_num_batched_tokens=512, page_size=16)


def run(trace, policy="fcfs", machine=MACHINE, options=None, **how):
    return simulate(trace, machine, *limits_of(machine, policy=policy, options=options, **LIMITS), **how)


def workload(n=150, rate=0.5, seed=0, name="sharegpt", **arrivals):
    return draw_workload(name, n, Arrivals(rate, **arrivals), seed=seed, max_model_len=2048)


def test_azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10\n",
        encoding="utf-8",
    )
    trace = read_trace(path)
    np.testing.assert_allclose(trace.arrivals, [0, 0.052], atol=1e-6)
    assert trace.prompts.tolist() == [4808, 3180] and trace.outputs.tolist() == [10, 8]
    short, left_out = trace.fitting(4000)
    assert short.prompts.tolist() == [3180] and left_out == 1
    assert trace.at_rate(2.0).arrivals.tolist() == pytest.approx([0, 0.5])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,x,1\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,0,1\n", "request 1 has 0 prompt"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 3}\n', "line 1: there is no 'output_length'"),
        ("a.jsonl", "[1\n", "line 1"),
        ("a.txt", "", "a trace is a .csv file"),
    ],
)
def test_broken_traces(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_trace(tmp_path / name)


def test_mooncake_prompts_that_begin_alike_share_pages(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 20, "hash_ids": [0, 1, 2]},
        {"timestamp": 9000, "input_length": 1300, "output_length": 20, "hash_ids": [0, 1, 3]},
        {"timestamp": 18000, "input_length": 1100, "output_length": 20, "hash_ids": [4, 1, 2]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trace = read_trace(path)
    assert trace.arrivals.tolist() == [0, 9, 18]
    outcome = run(trace)
    assert outcome.cached_tokens == 2 * 512  # a block's name stands for all before it too; but these are found by their first page
    ttft = outcome.first_token - trace.arrivals
    assert ttft[1] < ttft[0] / 1.5 < ttft[2]


def test_arrivals():
    rng = np.random.default_rng(0)
    for options in ({}, {"cv": 3.0}, {"burst_factor": 8.0}):
        times = draw_arrivals(rng, 40_000, Arrivals(rate=5.0, **options))
        gaps = np.diff(times)
        assert times[0] == 0 and (gaps >= 0).all() and 1 / gaps.mean() == pytest.approx(5.0, rel=0.1)
        if "cv" in options:
            assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)
        if "burst_factor" in options:
            windows = np.bincount((times / 4).astype(int))
            assert windows.var() / windows.mean() > 5  # of a Poisson process: 1
    for options in ({"rate": 0}, {"cv": -1}, {"burst_factor": 0.5}, {"burst_share": 1}):
        with pytest.raises(ConfigError):
            Arrivals(**options)


def test_lengths_are_those_of_the_data_sets():
    trace = workload(20_000)
    assert np.median(trace.prompts) == pytest.approx(np.exp(4.45), rel=0.05)
    assert np.log(trace.outputs).std() == pytest.approx(1.05, rel=0.08)  # long ones are cut
    assert (trace.prompts + trace.outputs).max() <= 2048


def test_one_request_by_hand():
    """A prompt of 1000 tokens in chunks of 512, then decodes."""
    m, trace = MACHINE, Trace(np.zeros(1), np.array([1000]), np.array([3]))
    outcome = run(trace)
    chunk = 512 * m.token_s + 512 * m.context_token_s + 512 * 256 * m.attend_pair_s
    rest = 488 * m.token_s + 1000 * m.context_token_s + 488 * (512 + 244) * m.attend_pair_s
    decode = lambda length: m.step_s + length * m.context_token_s
    assert outcome.first_token[0] == pytest.approx(chunk + rest)
    assert outcome.finished[0] == pytest.approx(chunk + rest + decode(1001) + decode(1002))
    f = figures(outcome)
    assert f["mean_tpot_s"] == pytest.approx((decode(1001) + decode(1002)) / 2)
    assert f["mean_normalized_latency_s"] == pytest.approx(f["mean_jct_s"] / 3)
    assert f["p50_itl_s"] == pytest.approx(decode(1001)) and f["p99_itl_s"] == pytest.approx(decode(1002))


def test_steps_at_once_are_steps_one_by_one():
    trace = workload(60, rate=0.6, burst_factor=4.0)
    for policy in ("fcfs", "priority"):
        fast, slow = run(trace, policy), run(trace, policy, at_once=False)
        assert fast.steps == slow.steps and fast.preemptions == slow.preemptions
        np.testing.assert_allclose(fast.finished, slow.finished, rtol=1e-9)
        np.testing.assert_allclose(fast.first_token, slow.first_token, rtol=1e-9)
        assert fast.gap_counts.sum() == slow.gap_counts.sum() == (trace.outputs - 1).sum()


def test_littles_law_and_order():
    """The mean number of requests in the system is their rate times their mean time in it; fcfs begins in order."""
    trace, events = workload(), []
    outcome = run(trace, watch=lambda begin, end, plan: events.append((begin, end, plan.num_tokens)))
    assert (np.diff(outcome.first_token) >= 0).all() and (outcome.finished >= outcome.first_token).all()
    assert all(a[1] <= b[0] + 1e-12 for a, b in zip(events, events[1:], strict=False)), "one step at a time"
    assert sum(end - begin for begin, end, _ in events) == pytest.approx(outcome.busy_s)
    assert sum(n for _, _, n in events) >= (trace.prompts + trace.outputs - 1).sum()


def test_goodput_and_refusals():
    outcome = run(workload())
    f, promised = figures(outcome), figures(outcome, Slo(ttft_s=0.5, tpot_s=0.05))
    assert 0 < promised["goodput_requests_per_s"] < f["goodput_requests_per_s"] == f["requests_per_s"]
    with pytest.raises(ConfigError, match="2100 tokens"):
        run(Trace(np.zeros(1), np.array([2000]), np.array([100])))
    with pytest.raises(ConfigError, match="no machine 'abacus'"):
        cost_model("abacus")


def test_the_command(tmp_path, capfd):
    flags = ["simulate", "--workload", "alpaca", "--num-requests", "60", "--load", "0.9", "--policy", "fcfs,priority", "--json"]
    outputs = []
    for _ in range(2):
        assert main(flags) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1], "the same seed gives the same bytes"
    policies = json.loads(outputs[0])["policies"]
    assert list(policies) == ["fcfs", "priority"] and policies["fcfs"]["requests"] == 60
    assert {"mean_jct_s", "p99_jct_s", "mean_normalized_latency_s", "p99_ttft_s", "p50_itl_s", "p95_tpot_s"} < set(policies["fcfs"])
    for wrong in ([], ["--workload", "alpaca", "--trace", "a.csv"], ["--workload", "alpaca", "--policy", "fifo"], ["--workload", "lisp"]):
        assert main(["simulate", *wrong]) == 2
    assert main([*flags[:5], "--policy", "mlfq", "--policy-options.levels", "4", "--policy-options.starvation-s", "0.5"]) == 0
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(dict(step_s=0.01, token_s=1e-4, kv_tokens=4096, kv_token_bytes=1000)), encoding="utf-8")
    assert main(["simulate", "--workload", "alpaca", "--num-requests", "9", "--machine", str(profile)]) == 0
