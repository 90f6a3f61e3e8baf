"""The next token, of text or of completions: pre-training and supervised fine-tuning differ in the batch's weights only."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from jaxllm.errors import ConfigError
from jaxllm.models import Decoder
from jaxllm.models.attention import dense_attend
from jaxllm.training.losses import token_cross_entropy

Metrics = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class CausalLM:
    """Cross-entropy of `targets`, weighted by `weights`. Metrics: `cross_entropy` and `accuracy`, a token."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.z_loss < 0:
            raise ConfigError(f"z_loss must not be negative, got {self.z_loss}")

    def __call__(self, model: Decoder, batch: dict[str, Array], key: jax.Array) -> tuple[Array, Array, Metrics]:
        options = dict(z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        sums = token_cross_entropy(model, forward(model, batch), batch["targets"], batch["weights"], **options)
        metrics = {"cross_entropy": (sums.cross_entropy, sums.weight), "accuracy": (sums.correct, sums.weight)}
        return sums.loss, sums.weight, metrics


def forward(model: Decoder, batch: dict[str, Array]) -> Float[Array, "B T D"]:
    """Hidden states of packed rows: no segment sees another."""
    return model(batch["tokens"], batch["positions"], dense_attend(batch["positions"], batch["segment_ids"]))[0]
