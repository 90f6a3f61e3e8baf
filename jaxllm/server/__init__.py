"""HTTP: OpenAI's protocol over an `AsyncLLM`. Needs `pip install "jaxllm[serve]"`."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(__name__, app=("make_app",), config=("ServerConfig",), run=("run_server",))
