"""The steps of make_training_goldens.py taken here, and how far apart the two end."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.adapters import LoraConfig, adapter_tensors, add_adapter, is_trainable
from jaxllm.adapters.peft import set_tensors
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.export import hf_tensors
from jaxllm.checkpoints.load import load_model
from jaxllm.sharding import ShardingRules, make_mesh
from jaxllm.training.objectives import ObjectiveConfig, make_objective
from jaxllm.training.optim import OptimizerConfig, make_optimizer
from jaxllm.training.parts import split_model
from jaxllm.training.step import StepConfig, init_state, make_train_step, place_batch


def full_and_lora(folder: Path, golden: dict[str, np.ndarray], scan_layers: bool = True, micro_batches: int = 1) -> dict[str, dict]:
    """Of `full` and `lora`: `loss`, the greatest difference of a loss; `grad_norm`, of a gradient's norm, relative; `weights`, the norm of
    the difference of a tensor after the last step by the tensor's norm, the greatest of all tensors; `update`, by that of what the steps
    changed, of all tensors together."""

    def fresh():
        model = load_model(open_checkpoint(folder), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=scan_layers)
        return nnx.merge(model.graph, model.params)

    found, model = {}, fresh()
    exported = lambda model: dict(hf_tensors(model.config, nnx.split(model, graph=False)[1]))
    before = {name: np.array(x) for name, x in exported(model).items()}
    told, after = _take_steps(model, golden, None, micro_batches)
    found["full"] = _apart(golden, "full", told, before, exported(after), _named(golden, "full:"))

    config, before = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), _named(golden, "before:")
    adapted = add_adapter(fresh(), config, rngs=nnx.Rngs(0))
    set_tensors(adapted, config, before)
    told, after = _take_steps(adapted, golden, is_trainable, micro_batches)
    found["lora"] = _apart(golden, "lora", told, before, adapter_tensors(after, config), _named(golden, "after:"))
    return found


def _named(golden, prefix):
    return {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}


def _take_steps(model, golden, chosen, micro_batches):
    """Losses and gradient norms [2, steps], and the model after them."""
    mesh, rules = make_mesh(), ShardingRules()
    parts, params, frozen = split_model(model, chosen)
    steps, settings = len(golden["tokens"]), StepConfig(max_grad_norm=1.0)
    config = OptimizerConfig(learning_rate=float(golden["learning_rate"]), lr_scheduler_type="linear")
    optimizer, schedule = make_optimizer(config, params, steps)
    state = init_state(params, optimizer, settings, 0)
    step = make_train_step(parts, make_objective(ObjectiveConfig("sft")), optimizer, schedule, settings, state)
    told = []
    for i in range(steps):
        batch = _batch_of(*(golden[name][i] for name in ("tokens", "prompts", "ends")))
        batch = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        state, metrics = step(state, frozen, place_batch(batch, mesh, rules))
        told.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.transpose(told), parts.merge(state.params, frozen)


def _batch_of(tokens, prompts, ends):
    """Rows [B, T] as make_training_goldens.py masks them."""
    place = np.arange(tokens.shape[1], dtype=np.int32)
    inside = place < ends[:, None]
    targets = np.roll(tokens, -1, axis=1)
    weights = (place + 1 >= prompts[:, None]) & (place + 1 < ends[:, None])
    whole = np.broadcast_to(place, tokens.shape)
    batch = dict(tokens=tokens, targets=targets, segment_ids=inside, positions=whole)
    return {name: x.astype(np.int32) for name, x in batch.items()} | {"weights": weights.astype(np.float32)}


def _apart(golden, mode, told, before, ours, theirs):
    losses, norms = (golden[f"{mode}_{name}"] for name in ("losses", "norms"))
    norm = np.linalg.norm
    off = {name: norm(np.asarray(ours[name]) - x) for name, x in theirs.items()}
    moved = norm([norm(x - before[name]) for name, x in theirs.items()])
    return {
        "loss": float(np.abs(told[0] - losses).max()),
        "grad_norm": float(np.abs(told[1] / norms - 1).max()),
        "weights": float(max(off[name] / norm(x) for name, x in theirs.items())),
        "update": float(norm(list(off.values())) / moved),
    }
