"""Serving: requests, the scheduler, the page pool, the jitted step, and the Python API."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    async_llm=("AsyncLLM",),
    beam=("BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence"),
    config=("EngineConfig",),
    engine=("Engine",),
    llm=("LLM",),
    news=("EngineDeadError",),
    pooling=("EmbeddingOutput", "EmbeddingRequestOutput"),
    request=("CompletionOutput", "RequestOutput"),
    sampling_params=("SamplingParams",),
)
