"""OpenTelemetry: a span for each prompt, with vLLM's name and attributes (OpenTelemetry's GenAI conventions, and latencies)."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.serving import RequestOutput, SamplingParams

# The W3C headers (traceparent, tracestate) of the request that the running task answers.
trace_headers: ContextVar[dict[str, str] | None] = ContextVar("trace_headers", default=None)
HEADERS = ("traceparent", "tracestate")


class Tracer:
    """Sends spans to an OTLP collector over HTTP (`endpoint`: http://HOST:4318/v1/traces), in batches and behind the server's back."""

    def __init__(self, endpoint: str, model: str):
        """Raises ConfigError."""
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_traces_endpoint must be a URL such as http://localhost:4318/v1/traces, not {endpoint!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f'otlp_traces_endpoint needs {error.name}: pip install "jaxllm[otel]"') from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxllm"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer, self._propagator, self._model = self._provider.get_tracer("jaxllm"), TraceContextTextMapPropagator(), model

    def tell(self, output: RequestOutput, params: SamplingParams) -> None:
        """Of a prompt that runs no more, finished or not, as far as it came."""
        from opentelemetry.trace import SpanKind

        times, now = output.metrics, time.monotonic()
        to_ns = lambda moment: time.time_ns() - int((now - moment) * 1e9)
        end = times.finished_time or now
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(trace_headers.get() or {}),
            kind=SpanKind.SERVER,
            start_time=to_ns(times.arrival_time),
            attributes=self._attributes(output, params, end),
        )
        span.end(to_ns(end))

    def _attributes(self, output: RequestOutput, params: SamplingParams, end: float) -> dict[str, Any]:
        times, reasons = output.metrics, [each.finish_reason for each in output.outputs]
        latencies = {
            "time_in_queue": (times.arrival_time, times.scheduled_time),
            "time_to_first_token": (times.arrival_time, times.first_token_time),
            "e2e": (times.arrival_time, end),
            "time_in_model_prefill": (times.scheduled_time, times.first_token_time),
            "time_in_model_decode": (times.first_token_time, end),
            "time_in_model_inference": (times.scheduled_time, end),
        }
        attributes: dict[str, Any] = {
            "gen_ai.request.id": output.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.completion_tokens": sum(len(each.token_ids) for each in output.outputs),
            "gen_ai.response.finish_reasons": [reason or "abort" for reason in reasons],
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        told = {name: until - since for name, (since, until) in latencies.items() if since is not None and until is not None}
        return attributes | {f"gen_ai.latency.{name}": seconds for name, seconds in told.items()}

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()
