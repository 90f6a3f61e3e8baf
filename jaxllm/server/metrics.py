"""Prometheus metrics, under vLLM's names with the prefix `jaxllm:`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from jaxllm.server.tally import Counter, Histogram
from jaxllm.serving import AsyncLLM, RequestOutput, SamplingParams

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # s; vLLM's, as are the others
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_DELIVERY = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """Of one app: what its requests meet, and what its engine does."""

    def __init__(self, llm: AsyncLLM, model_name: str):
        self.registry = CollectorRegistry()
        label = ("model_name", model_name)
        counter = lambda name, doc: Counter(f"jaxllm:{name}", doc, label, self.registry)
        histogram = lambda name, doc, bounds: Histogram(f"jaxllm:{name}", doc, label, bounds, self.registry)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, those in the cache included.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.queries = counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self.hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        labels = ["model_name", "finished_reason"]
        ended = prometheus_client.Counter("jaxllm:request_success", "Prompts that have ended, by how.", labels, registry=self.registry)
        self.ended = {reason: ended.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.between = histogram("inter_token_latency_seconds", "From a token to the next.", _BETWEEN)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time for each token after the first.", _BETWEEN
        )
        self.delivery = histogram("token_delivery_seconds", "From the engine's having a token to the server's having it.", _DELIVERY)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _LATENCY)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _LATENCY)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", _LATENCY)
        self.inference = histogram("request_inference_time_seconds", "From the first step to the last token.", _LATENCY)
        self.request_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _STEP)
        self.request_generation = histogram("request_generation_tokens", "Tokens generated for a prompt.", _STEP)
        self.request_n = histogram("request_params_n", "The parameter n.", (1, 2, 5, 10, 20))
        self.iteration = histogram("iteration_tokens_total", "Tokens in a step of the engine.", _STEP)
        self.registry.register(_EngineCollector(llm, model_name))
        llm.on_step = self.iteration.observe

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self, params: SamplingParams, *, shown: bool = True) -> Watch:
        """For one prompt that is about to run. `shown`: whether anybody gets to see what is drawn."""
        self.request_n.observe(params.n)
        return Watch(self, shown)


class Watch:
    """Follows one prompt."""

    def __init__(self, metrics: Metrics, shown: bool):
        self._metrics, self._shown, self._tokens, self._over = metrics, shown, 0, False
        self._last: float | None = None  # when there was something new

    def news(self, output: RequestOutput) -> int:
        """Counts what there is now; returns how many tokens, of the prompt and of the answers, were not there before."""
        metrics, now = self._metrics, time.monotonic()
        tokens = output.num_tokens if self._shown else 0
        new, times = tokens - self._tokens, output.metrics
        counted = max(0, new)  # beams may have fewer
        if self._shown and times.last_token_time is not None:
            metrics.delivery.observe(now - times.last_token_time)
        metrics.generation_tokens.inc(counted)
        if self._last is None and times.first_token_time is not None:
            counted += len(output.prompt_token_ids)
            metrics.prompt_tokens.inc(len(output.prompt_token_ids))
            metrics.queries.inc(len(output.prompt_token_ids))
            metrics.hits.inc(output.num_cached_tokens)
            if self._shown:
                metrics.first_token.observe(times.first_token_time - times.arrival_time)
            metrics.queue.observe(times.scheduled_time - times.arrival_time)
            metrics.prefill.observe(times.first_token_time - times.scheduled_time)
            self._last = now
        elif new > 0:
            metrics.between.observe(now - self._last)
            self._last = now
        self._tokens = tokens
        if output.finished:
            self._end(output)
        return counted

    def _end(self, output: RequestOutput) -> None:
        metrics, times = self._metrics, output.metrics
        self._over = True
        for each in output.outputs:
            metrics.ended[each.finish_reason].inc()
        metrics.request_prompt.observe(len(output.prompt_token_ids))
        metrics.whole.observe(times.finished_time - times.arrival_time)
        if times.first_token_time is not None:
            metrics.inference.observe(times.finished_time - times.scheduled_time)
        if self._shown:
            metrics.request_generation.observe(self._tokens)
        if self._shown and times.first_token_time is not None:
            metrics.decode.observe(times.finished_time - times.first_token_time)
            if (longest := max(len(each.token_ids) for each in output.outputs)) > 1:
                metrics.per_token.observe((times.finished_time - times.first_token_time) / (longest - 1))

    def close(self) -> None:
        """It runs no more, whether it has come to its end or not."""
        if not self._over:
            self._metrics.ended["abort"].inc()


class _EngineCollector:
    """What the engine has at the moment of the asking; counts of other threads may be a step old."""

    def __init__(self, llm: AsyncLLM, model_name: str):
        self._llm, self._model_name = llm, model_name

    def collect(self) -> Iterator[Metric]:
        now = self._llm.figures
        gauges = {
            "num_requests_running": ("Sequences that run.", now.running),
            "num_requests_waiting": ("Sequences that wait for a place or pages.", now.waiting),
            "engine_silent_seconds": ("For how long requests have waited without any news of the engine.", self._llm.silent_for),
            "kv_cache_usage_perc": ("Share of the KV cache's pages in use; 1 is all.", 1 - now.free_pages / now.pages),
        }
        counters = {
            "num_preemptions": ("Sequences that gave up their pages and waited to be computed again.", now.preemptions),
            "engine_steps": ("Steps of the engine.", now.steps),
            "engine_host_seconds": ("What the host took for them, apart from waiting for the device.", now.host_s),
            "compiles_after_warmup": ("Programs compiled while requests waited: each is a bug.", now.compiles_after_warmup),
            "engine_restarts": ("Times the engine died and was started again.", self._llm.restarts),
        }
        if (host := now.host_tier) is not None:
            gauges["host_kv_cache_usage_perc"] = ("Share of host memory's pages that hold any; 1 is all.", host.used / host.pages)
            counters["kv_pages_swapped_out"] = ("Pages copied to host memory.", host.saved)
            counters["kv_pages_swapped_in"] = ("Pages copied back, in place of being computed again.", host.fetched)
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (doc, value) in values.items():
                metric = family(f"jaxllm:{name}", doc, labels=["model_name"])
                metric.add_metric([self._model_name], value)
                yield metric
