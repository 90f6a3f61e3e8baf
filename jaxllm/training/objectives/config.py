"""What is minimised, and how."""

from dataclasses import dataclass
from typing import Literal

from jaxllm.errors import ConfigError

Name = Literal["causal_lm", "sft", "dpo", "orpo", "kto", "simpo", "reward"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Names and meanings are TRL's; each objective reads only its own settings."""

    name: Name = "sft"
    "causal_lm and sft are one loss (data decides which tokens count); dpo, orpo, simpo and reward take pairs; kto takes labels."
    label_smoothing: float = 0.0
    "causal_lm, sft: the share spread over all tokens. dpo: the probability that a pair is labelled the wrong way round (cDPO)."
    z_loss: float = 0.0
    "causal_lm, sft: weight of log(Z)^2, which keeps logits from drifting."
    beta: float = 0.1
    "dpo, kto, orpo, simpo: strength of the preference; simpo's authors use 2.0 to 2.5."
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    "dpo: of Rafailov et al. (arXiv 2305.18290), SLiC (arXiv 2305.10425) or IPO (arXiv 2310.12036)."
    simpo_gamma: float = 0.5
    "simpo: the margin that the chosen answer should win by."
    desirable_weight: float = 1.0
    "kto: of examples labelled true."
    undesirable_weight: float = 1.0
    "kto: of examples labelled false."
    center_rewards_coefficient: float | None = None
    "reward: weight of the squared sum of a pair's rewards (arXiv 2312.09244); TRL suggests 0.01."

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < (0.5 if self.name == "dpo" else 1):
            raise ConfigError(f"label_smoothing must be from 0 to below {0.5 if self.name == 'dpo' else 1}, not {self.label_smoothing}")
        if self.beta <= 0:
            raise ConfigError(f"beta must be above 0, not {self.beta}")
        if self.label_smoothing and self.name not in ("causal_lm", "sft", "dpo"):
            raise ConfigError(f"label_smoothing: {self.name} has none; leave it out")
        if self.z_loss and self.name not in ("causal_lm", "sft"):
            raise ConfigError(f"z_loss: {self.name} has none; leave it out")
        if self.loss_type != "sigmoid" and self.name != "dpo":
            raise ConfigError(f"loss_type: {self.name} has one loss; leave it out")
        if self.label_smoothing and self.loss_type == "hinge":
            raise ConfigError("label_smoothing: hinge has none; leave it out")

    @property
    def needs_reference(self) -> bool:
        """Whether batches must hold `reference_logps`: see `reference_log_probs`."""
        return self.name in ("dpo", "kto")

    @property
    def data(self) -> Literal["tokens", "pairs", "labels"]:
        """The kind of batch that the objective reads."""
        return {"kto": "labels", "dpo": "pairs", "orpo": "pairs", "simpo": "pairs", "reward": "pairs"}.get(self.name, "tokens")
