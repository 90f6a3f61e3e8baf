"""jaxllm serves and fine-tunes large language models with nothing but JAX and XLA under it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.serving import LLM, AsyncLLM, BeamSearchParams, EngineConfig, RequestOutput, SamplingParams

__version__ = "0.1.0.dev0"
__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when it is used: `import jaxllm` and `jaxllm --help` do not wait for JAX
        from jaxllm import serving

        return getattr(serving, name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
