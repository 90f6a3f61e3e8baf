"""Twenty steps as transformers and PEFT take them: the same losses, gradient norms and weights."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import FOLDER, MODELS

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


def batch_of(tokens, prompts, ends):
    """Rows [B, T] as make_training_goldens.py masks them."""
    place = np.arange(tokens.shape[1], dtype=np.int32)
    inside = place < ends[:, None]
    targets = np.roll(tokens, -1, axis=1)
    weights = (place + 1 >= prompts[:, None]) & (place + 1 < ends[:, None])
    whole = np.broadcast_to(place, tokens.shape)
    batch = dict(tokens=tokens, targets=targets, segment_ids=inside, positions=whole)
    return {name: x.astype(np.int32) for name, x in batch.items()} | {"weights": weights.astype(np.float32)}


def take_steps(model, golden, chosen, micro_batches=1):
    """Losses and gradient norms of all steps, and the model after them."""
    mesh, rules = make_mesh(), ShardingRules()
    parts, params, frozen = split_model(model, chosen)
    steps, settings = len(golden["tokens"]), StepConfig(max_grad_norm=1.0)
    config = OptimizerConfig(learning_rate=float(golden["learning_rate"]), lr_scheduler_type="linear")
    optimizer, schedule = make_optimizer(config, params, steps)
    state = init_state(params, optimizer, settings, 0)
    step = make_train_step(parts, make_objective(ObjectiveConfig("sft")), optimizer, schedule, settings, state)
    told = []
    for i in range(steps):
        batch = batch_of(*(golden[name][i] for name in ("tokens", "prompts", "ends")))
        batch = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        state, metrics = step(state, frozen, place_batch(batch, mesh, rules))
        told.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return *zip(*told, strict=True), parts.merge(state.params, frozen)


def check(golden, mode, losses, norms, weights, norms_rtol):
    apart = max(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in weights.values())
    print(f"{mode}: losses apart by {np.abs(losses - golden[f'{mode}_losses']).max():.2g}, weights by {apart:.2g} relative")
    np.testing.assert_allclose(losses, golden[f"{mode}_losses"], atol=1e-4)
    np.testing.assert_allclose(norms, golden[f"{mode}_norms"], rtol=norms_rtol)
    for name, (ours, theirs) in weights.items():
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def full_and_lora(folder: Path, golden, scan_layers: bool, micro_batches: int, norms_rtol=1e-3) -> None:
    load = lambda: load_model(open_checkpoint(folder), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=scan_layers)
    merged = lambda model: nnx.merge(model.graph, model.params)
    model = load()
    losses, norms, after = take_steps(merged(model), golden, None, micro_batches)
    ours = dict(hf_tensors(model.config, nnx.split(after, graph=False)[1]))
    check(golden, "full", losses, norms, {n[5:]: (ours[n[5:]], golden[n]) for n in golden if n.startswith("full:")}, norms_rtol)

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapted = add_adapter(merged(load()), config, rngs=nnx.Rngs(0))
    set_tensors(adapted, config, {n.removeprefix("before:"): golden[n] for n in golden if n.startswith("before:")})
    losses, norms, after = take_steps(adapted, golden, is_trainable, micro_batches)
    ours = adapter_tensors(after, config)
    check(golden, "lora", losses, norms, {n[6:]: (ours[n[6:]], golden[n]) for n in golden if n.startswith("after:")}, norms_rtol)


@pytest.mark.parametrize(("scan_layers", "micro_batches"), [(True, 1), (False, 4)])
def test_as_transformers_and_peft(scan_layers, micro_batches):
    with np.load(FOLDER / "training.npz") as data:
        full_and_lora(MODELS / "llama_gqa", dict(data), scan_layers, micro_batches)


@pytest.mark.slow
def test_a_real_model():
    """pytest -m slow -s tests/training/test_parity.py, after make_training_goldens.py MODEL OUT, with the two in the environment."""
    model, golden = (os.environ.get(f"JAXLLM_PARITY_{name}") for name in ("MODEL", "GOLDEN"))
    if not (model and golden):
        pytest.skip("JAXLLM_PARITY_MODEL and JAXLLM_PARITY_GOLDEN name no model and golden: see make_training_goldens.py")
    with np.load(golden) as data:
        full_and_lora(Path(model), dict(data), True, 1, norms_rtol=5e-3)  # torch sums 28 million squares in float32
