"""Metrics: read by Prometheus's own parser, and held to what was asked."""

import json
import re
import urllib.request
from pathlib import Path

import openai
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from servers import serving, settled

from jaxllm.server import tally

# vLLM's (vllm/v1/metrics/loggers.py), without its prefix.
NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
    "prompt_tokens", "generation_tokens", "request_success", "iteration_tokens_total", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_n",
}  # fmt: skip


def read(where):
    """{(name, sorted labels other than the model's): value}, and the families' names."""
    text = urllib.request.urlopen(f"{where}/metrics").read().decode()
    families = list(text_string_to_metric_families(text))
    values = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        assert labels.pop("model_name") == "tiny"
        values[sample.name.removeprefix("jaxllm:"), *sorted(labels.values())] = sample.value
    return values, {family.name.removeprefix("jaxllm:") for family in families}


@pytest.fixture(scope="module")
def where(llm):
    with serving(llm) as (where, _):
        yield where


def test_what_requests_leave_in_the_metrics(where, llm):
    client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
    before, names = read(where)
    assert NAMES | {"compiles_after_warmup"} <= names
    usages = [client.completions.create(model="tiny", prompt=f"Number {i}", max_tokens=9, seed=i).usage for i in range(3)]
    usages.append(client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=5).usage)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", max_tokens=10**6)
    with client.completions.create(model="tiny", prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    settled(llm)
    after, _ = read(where)
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["prompt_tokens_total",] == sum(usage.prompt_tokens for usage in usages) + 1
    assert change["generation_tokens_total",] >= sum(usage.completion_tokens for usage in usages)
    assert change["prefix_cache_queries_total",] == change["prompt_tokens_total",]
    assert change["request_success_total", "length"] + change["request_success_total", "stop"] == 7
    assert change["request_success_total", "abort"] == 1 and change["request_success_total", "error"] == 0
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "request_queue_time_seconds", "request_decode_time_seconds"):
        assert change[f"{name}_count",] == 5 + (name == "request_queue_time_seconds"), name
    assert change["time_to_first_token_seconds_count",] == 6
    assert change["request_prompt_tokens_sum",] == sum(usage.prompt_tokens for usage in usages)
    assert change["iteration_tokens_total_count",] == change["engine_steps_total",] > 0
    assert change["iteration_tokens_total_sum",] >= change["generation_tokens_total",]
    times = [change[f"request_{part}_time_seconds_sum",] for part in ("queue", "prefill", "decode", "inference")]
    assert min(times) >= 0 and times[3] > 0
    assert after["num_requests_running",] == after["num_requests_waiting",] == after["kv_cache_usage_perc",] == 0
    assert after["compiles_after_warmup_total",] == 0


def test_a_token_that_nobody_sees_is_not_counted(where):
    client = openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0)
    before, _ = read(where)
    used = client.embeddings.create(model="tiny", input="Once upon a time").usage
    client.completions.create(model="tiny", prompt="x", max_tokens=0, extra_body={"echo": True})
    after, _ = read(where)
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["prompt_tokens_total",] == used.prompt_tokens + 1 and change["generation_tokens_total",] == 0
    assert change["time_to_first_token_seconds_count",] == change["request_generation_tokens_count",] == 0
    assert change["e2e_request_latency_seconds_count",] == change["request_success_total", "length"] == 2


def test_our_counts_are_written_as_prometheus_writes_its_own():
    ours, theirs, bounds = CollectorRegistry(), CollectorRegistry(), (0.5, 1, 2.5)
    histogram, count = tally.Histogram("a:b", "Doc.", ("m", "x"), bounds, ours), tally.Counter("a:c", "Doc.", ("m", "x"), ours)
    other = prometheus_client.Histogram("a:b", "Doc.", ["m"], buckets=bounds, registry=theirs).labels("x")
    third = prometheus_client.Counter("a:c", "Doc.", ["m"], registry=theirs).labels("x")
    for value in (0.1, 0.5, 0.7, 1, 1.0001, 2.5, 3, 1e9):
        histogram.observe(value)
        other.observe(value)
    count.inc(3)
    third.inc(3)
    written = lambda registry: [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    assert written(ours) == written(theirs)


def test_the_dashboard_asks_for_nothing_that_is_not_there(where):
    dashboard = json.loads((Path(__file__).parents[2] / "launch" / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"jaxllm:(\w+)", target["expr"])}
    there = {name for name, *_ in read(where)[0]}
    assert len(asked) > 15 and asked <= there
