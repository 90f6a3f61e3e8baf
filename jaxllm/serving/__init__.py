"""Serving: requests, the scheduler, the page pool, the jitted step, and the Python API."""

from jaxllm.serving.async_llm import AsyncLLM, EngineDeadError
from jaxllm.serving.beam import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.engine import Engine
from jaxllm.serving.llm import LLM
from jaxllm.serving.pooling import EmbeddingOutput, EmbeddingRequestOutput
from jaxllm.serving.request import CompletionOutput, RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "RequestOutput",
    "SamplingParams",
]
