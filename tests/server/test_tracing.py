"""Traces, as a collector on loopback gets them."""

import http.server
import json
import threading
import urllib.request

import pytest
from servers import serving

from jaxllm.errors import ConfigError
from jaxllm.server.tracing import Tracer


def test_a_bad_endpoint():
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL"):
        Tracer("localhost:4317", "tiny")


def test_spans(llm):
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.headers["Content-Encoding"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serving(llm, otlp_traces_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces") as (where, server):
        body = {"prompt": ["Once upon", "Twice"], "max_tokens": 5, "ignore_eos": True, "temperature": 0.5}
        headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-{parent}-01"}
        asked = urllib.request.Request(f"{where}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked) as answer:
            usage = json.load(answer)["usage"]
        server.close()
    collector.shutdown()
    collector.server_close()
    spans = []
    for path, encoding, raw in got:
        assert path == "/v1/traces" and encoding in (None, "identity")
        request = messages.ExportTraceServiceRequest.FromString(raw)
        spans += [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["llm_request"] * 2
    told = [{each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes} for span in spans]
    assert all(span.trace_id.hex() == trace and span.parent_span_id.hex() == parent for span in spans)
    assert sum(each["gen_ai.usage.prompt_tokens"] for each in told) == usage["prompt_tokens"]
    for span, each in zip(spans, told, strict=True):
        assert each["gen_ai.usage.completion_tokens"] == 5 and each["gen_ai.request.max_tokens"] == 5
        assert each["gen_ai.request.temperature"] == 0.5 and each["gen_ai.response.model"] == "tiny"
        e2e, first, queue = (each[f"gen_ai.latency.{name}"] for name in ("e2e", "time_to_first_token", "time_in_queue"))
        assert 0 <= queue <= first <= e2e and abs((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 - e2e) < 0.01
