"""Preference and reward losses as TRL's trainers compute them: the same to 1e-5, and gradients of the same norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import decoder
from flax import nnx
from golden_cases import FOLDER

from jaxllm.training.data.batching import make_arrays
from jaxllm.training.data.encode import Sequence
from jaxllm.training.objectives import ObjectiveConfig, add_score, make_objective, mismatched, without_head
from jaxllm.training.parts import split_model

CASES = {
    "dpo_sigmoid": ObjectiveConfig("dpo", beta=0.3),
    "dpo_hinge": ObjectiveConfig("dpo", beta=0.3, loss_type="hinge"),
    "dpo_ipo": ObjectiveConfig("dpo", beta=0.3, loss_type="ipo"),
    "kto": ObjectiveConfig("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    "orpo": ObjectiveConfig("orpo", beta=0.3),
    "simpo": ObjectiveConfig("simpo", beta=0.3, simpo_gamma=0.7),
    "reward": ObjectiveConfig("reward"),
    "reward_centred": ObjectiveConfig("reward", center_rewards_coefficient=0.1),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "preference.npz") as data:
        return dict(data)


def answers(golden, names, prompt_length=None):
    """A batch of prompts followed by the answers under `names`, one name a row."""
    prompts = [row[row > 0][:prompt_length] for row in golden["prompt_ids"]]
    rows = [golden[name][i] for i, name in enumerate(names)]
    ids = [np.concatenate([prompt, row[row > 0]]) for prompt, row in zip(prompts, rows, strict=True)]
    learned = [np.arange(len(row)) >= len(prompt) for row, prompt in zip(ids, prompts, strict=True)]
    return make_arrays([[Sequence(*pair)] for pair in zip(ids, learned, strict=True)], len(ids) + 1, 20)  # the last row is empty


def batch_of(golden, name):
    if name == "kto":
        rows = answers(golden, ["chosen_ids" if good else "rejected_ids" for good in golden["labels"]])
        batch = mismatched({**rows, "labels": np.append(golden["labels"], False)})
        batch["reference_logps"], batch["kl"]["reference_logps"] = (np.append(golden[f"reference_{n}"], 0) for n in ("chosen", "kl"))
        return batch
    batch = {half: answers(golden, [f"{half}_ids"] * 4, 1 if name == "orpo" else None) for half in ("chosen", "rejected")}
    for half, part in batch.items():
        part["reference_logps"] = np.append(golden[f"reference_{half}"], 0)
    return batch


@pytest.mark.parametrize("name", CASES)
def test_as_trl(name, golden):
    model = decoder("llama_gqa", True)
    if name.startswith("reward"):
        model = add_score(without_head(model), rngs=nnx.Rngs(0))
        model.score.weight = model.score.weight.replace(jnp.linspace(-1, 1, 32)[None])
    parts, params, frozen = split_model(model)
    objective = make_objective(CASES[name])

    @jax.jit
    def loss(params, batch):
        total, weight, metrics = objective(parts.merge(params, frozen), batch, jax.random.key(0))
        return total / weight, metrics

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_of(golden, name))
    expected, norm = golden[name]
    assert float(value) == pytest.approx(expected, rel=2e-6, abs=1e-5)
    assert float(optax.tree.norm(grads)) == pytest.approx(norm, rel=1e-4)
    if name == "kto":
        total, weight = metrics["kl"]
        assert float(total / weight) == pytest.approx(float(golden["kto_kl"]), abs=1e-4)
