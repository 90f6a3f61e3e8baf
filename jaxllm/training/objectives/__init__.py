"""What is minimised: `objective(model, batch, key) -> (loss_sum, weight_sum, metrics)`, metrics being (sum, weight) by name."""

from jaxllm.training.objectives.causal_lm import CausalLM, forward

__all__ = ["CausalLM", "forward"]
