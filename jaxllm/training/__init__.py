"""Fine-tuning: the one loop, its objectives, data, optimisers and checkpoints."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(__name__, config=("MeshConfig", "TrainConfig"), plots=("plot_run",), trainer=("TrainResult", "Trainer"))
