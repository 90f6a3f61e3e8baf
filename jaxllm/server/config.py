"""What a server is told, besides its engine's settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from jaxllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens, whom it serves, and how much of it."""

    host: str = "127.0.0.1"
    "Address to listen at; 0.0.0.0 is every one of this machine."
    port: int = 8000
    "Port to listen at; 0 takes a free one."
    served_model_name: tuple[str, ...] = ()
    "Names that requests may call the model by; by default what --model says."
    api_key: tuple[str, ...] = ()
    "Keys of which every request must bring one (better in the environment: JAXLLM_API_KEY, separated by commas)."
    api_key_file: str | None = None
    "YAML file of more keys: `name: {key: ..., requests_per_minute: 60, tokens_per_minute: 100000}`; limits may be left out."
    tool_call_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "pythonic"] = "auto"
    "How the model writes its calls of tools; auto: as its chat template shows."
    reasoning_parser: Literal["auto", "none", "think"] = "auto"
    "Tell `<think>...</think>` apart from the answer, as reasoning_content; auto: if the chat template has it."
    unknown_fields: Literal["refuse", "warn"] = "refuse"
    "What becomes of a request with a field that is not implemented: an error, or a line in the log and the field is left out."
    max_pending: int = 512
    "Prompts that may be unfinished at a time; further requests get 429."
    max_prompts: int = 1024
    "Prompts times `n` that one request may have."
    max_body_bytes: int = 4 << 20
    "Bytes of the longest request."
    max_stored_responses: int = 1000
    "Finished answers of /v1/responses that are kept in memory, for `previous_response_id` and GET."
    request_timeout: float | None = None
    "Seconds after which a request is ended with an error; by default never."
    step_timeout: float | None = 120.0
    "Seconds without a step, while requests wait for one, after which /health says that the engine hangs; null: never."
    drain_timeout: float = 30.0
    "Seconds that requests have to finish after SIGTERM."
    allowed_origins: tuple[str, ...] = ()
    "Web pages (https://host) that browsers may call this server from; `*` is all. By default only its own."
    tls_certificate: str | None = None
    "File of the certificate (PEM) to serve https with."
    tls_key: str | None = None
    "File of its private key (PEM)."
    otlp_traces_endpoint: str | None = None
    "Send OpenTelemetry traces to this collector: http://HOST:4318/v1/traces (OTLP over HTTP)."
    access_log: bool = True
    "Log a line for every request."

    def __post_init__(self):
        for name in ("max_pending", "max_prompts", "max_body_bytes", "max_stored_responses"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        for name in ("request_timeout", "step_timeout"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout must be at least 0, not {self.drain_timeout}")
        if self.unknown_fields not in ("refuse", "warn"):
            raise ConfigError(f"unknown_fields must be refuse or warn, not {self.unknown_fields!r}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both, or neither")
        if any(not key.strip() for key in self.keys):
            raise ConfigError("api_key must not be empty")

    @property
    def keys(self) -> tuple[str, ...]:
        return self.api_key or tuple(filter(None, os.environ.get("JAXLLM_API_KEY", "").split(",")))
