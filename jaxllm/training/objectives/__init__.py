"""Objectives: `objective(model, batch, key) -> (loss_sum, weight_sum, metrics)`, made by name."""

from jaxllm.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    base=("Batch", "Objective", "reference_log_probs", "sequence_log_probs"),
    config=("ObjectiveConfig",),
    kto=("mismatched",),
    registry=("OBJECTIVES", "make_objective"),
    reward=("add_score", "scores", "without_head"),
)
