"""Checkpoints: finding them, reading them as named tensors, writing them."""

from jaxllm.checkpoints.convert import convert
from jaxllm.checkpoints.resolve import resolve_model
from jaxllm.checkpoints.source import TensorInfo, TensorSource, open_checkpoint
from jaxllm.checkpoints.writer import write_safetensors

__all__ = ["TensorInfo", "TensorSource", "convert", "open_checkpoint", "resolve_model", "write_safetensors"]
