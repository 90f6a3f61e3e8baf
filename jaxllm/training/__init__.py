"""Fine-tuning: the one loop, its objectives, data, optimisers and checkpoints."""

from jaxllm.training.config import MeshConfig, TrainConfig
from jaxllm.training.trainer import Trainer, TrainResult

__all__ = ["MeshConfig", "TrainConfig", "TrainResult", "Trainer"]
