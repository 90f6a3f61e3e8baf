"""`bench serve` against our own server: it counts what was asked for, and reads the traces that others publish."""

import json

import numpy as np
import pytest

from jaxllm.config import parse
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.launch.bench import load
from jaxllm.launch.bench.http_client import Measured
from jaxllm.launch.bench.serve import Config, figures, run

# vLLM's (vllm/benchmarks/serve.py).
NAMES = {"duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput"}
NAMES |= {
    "total_token_throughput",
    *(f"{how}_{what}_ms" for how in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")),
}


def test_a_random_load(server):
    flags = ["--num-prompts", "8", "--input-len", "20", "--output-len", "10", "--vocab-size", "500", "--request-rate", "200"]
    result = run(parse(Config, ["--base-url", server, *flags, "--max-concurrency", "3", "--goodput.e2el", "1e9"], prog="x"))
    assert NAMES <= set(result) and result["completed"] == 8 and result["failed"] == 0 and result["errors"] == []
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (160, 80)
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert result["mean_ttft_ms"] <= result["mean_e2el_ms"]


def test_sharegpt_over_chat_and_a_trace(server, tmp_path):
    talk = tmp_path / "talk.jsonl"
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "one two three"}]
    talk.write_text("\n".join([json.dumps({"conversations": turns})] * 3 + [json.dumps({"conversations": turns[:1]})]))
    result = run(Config(base_url=server, endpoint="chat", dataset="sharegpt", dataset_path=str(talk)))
    assert (result["completed"], result["total_output_tokens"]) == (3, 12)
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 10 * i, "input_length": 600, "output_length": 4, "hash_ids": [7, i]} for i in range(3)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    result = run(Config(base_url=server, dataset="trace", dataset_path=str(trace), vocab_size=500))
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (3, 1800, 12)


def test_traces_are_read_as_published(tmp_path):
    azure = tmp_path / "azure.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    first, second = load.trace_load(np.random.default_rng(0), str(azure), 10, vocab_size=1000)
    assert (len(first.prompt), first.output_len, first.at) == (374, 44, 0.0) and second.at == pytest.approx(4.314579, abs=1e-4)
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 0, "input_length": 1100, "output_length": 0, "hash_ids": [46, 47, 48]}\n' * 2)
    one, same = load.trace_load(np.random.default_rng(0), str(mooncake), 10, vocab_size=1000)
    assert one.prompt == same.prompt and len(one.prompt) == 1100 and one.output_len == 1


def test_arrivals_have_their_rate():
    gaps = np.diff(list(load.arrivals(np.random.default_rng(0), 20_000, 50.0, 1.0)))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.05)
    even = np.diff(list(load.arrivals(np.random.default_rng(0), 20_000, 50.0, 100.0)))
    assert even.mean() == pytest.approx(1 / 50, rel=0.05) and even.std() < 0.2 / 50


def test_figures_by_hand():
    one = Measured(start=0.0, moments=[1.0, 1.5, 2.0], prompt_tokens=5, output_tokens=3)
    two = Measured(start=1.0, moments=[2.0], prompt_tokens=7, output_tokens=1)
    result = figures([one, two, Measured(error="x")], 4.0, {"e2el": 1500})
    assert (result["completed"], result["failed"], result["errors"]) == (2, 1, ["x"])
    assert (result["mean_ttft_ms"], result["mean_tpot_ms"], result["mean_itl_ms"], result["mean_e2el_ms"]) == (1000, 500, 500, 1500)
    assert (result["request_throughput"], result["output_throughput"], result["total_token_throughput"]) == (0.5, 1.0, 4.0)
    assert result["request_goodput"] == 0.25


def test_what_goes_wrong_is_said(server, tmp_path):
    with pytest.raises(JaxLLMError, match="first request has failed.*400"):
        run(Config(base_url=server, vocab_size=10**6, num_prompts=1))
    with pytest.raises(JaxLLMError, match="first request has failed"):
        run(Config(base_url="http://127.0.0.1:9", num_prompts=1))
    for settings, what in [
        ({"num_prompts": 0}, "num_prompts"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"dataset": "trace"}, "dataset_path"),
        ({"endpoint": "chat"}, "sharegpt"),
        ({"goodput": {"tfft": 1.0}}, "tfft"),
    ]:
        with pytest.raises(ConfigError, match=what):
            Config(**settings)
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="neither Azure's trace nor Mooncake's"):
        run(Config(base_url=server, dataset="trace", dataset_path=str(bad)))
