"""The decoder, its configuration, and the families that are instances of it."""

from jaxllm.models.config import LayerConfig, ModelConfig, RopeConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.families import config_from_hf, family_of

__all__ = ["Decoder", "LayerConfig", "ModelConfig", "RopeConfig", "config_from_hf", "family_of"]
