"""Mistral 7B and its successors: Llama with a sliding window (Jiang et al., arXiv 2310.06825)."""

from jaxllm.models.config import ModelConfig
from jaxllm.models.families.hf import HFConfig, Weight, llama_weights

MODEL_TYPES = ("mistral",)
IGNORED = ("*.rotary_emb.inv_freq",)


def from_hf(hf: HFConfig) -> ModelConfig:
    return hf.decoder(windows=[hf.get("sliding_window")] * hf.require("num_hidden_layers"))


def weights(config: ModelConfig) -> dict[str, Weight]:
    return llama_weights(config)
