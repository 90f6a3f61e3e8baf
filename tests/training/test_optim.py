"""Optimisers take steps downhill, groups and masks do what they say, schedules are those of transformers."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.training.optim import OptimizerConfig, ParamGroup, evaluation_params, make_optimizer, make_schedule
from jaxllm.training.optim.config import OptimizerName

NAMES = get_args(OptimizerName)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shapes = {"embed_tokens": (64, 96), "blocks.0.mlp.up_proj.weight": (2, 64, 96), "blocks.0.mlp_norm.weight": (2, 96), "odd": (13, 521)}
    return {name: draw(*shape) for name, shape in shapes.items()}


def distance(params):
    return sum(jnp.sum(jnp.square(p - 0.3)) for p in params.values())


def steps(config, params, count, loss=distance):
    tx, _ = make_optimizer(config, params, count)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state)
    return evaluation_params(config, state, params)


@pytest.mark.parametrize("name", NAMES)
def test_descends(name, params):
    rate = 1e-2 if name != "sgd" else 1e-3
    after = steps(OptimizerConfig(name=name, learning_rate=rate, lr_scheduler_type="constant"), params, 10)
    assert distance(after) < distance(params)
    for key, p in after.items():
        assert p.dtype == jnp.float32 and not np.array_equal(p, params[key]), key


def test_adam8bit_is_near_adamw_and_takes_a_quarter_of_the_memory(params):
    config = dict(learning_rate=1e-2, lr_scheduler_type="constant")
    exact, coarse = (steps(OptimizerConfig(name=name, **config), params, 30) for name in ("adamw", "adam8bit"))
    for key in params:
        moved = np.linalg.norm(exact[key] - params[key])
        assert np.linalg.norm(exact[key] - coarse[key]) < 0.05 * moved, key
    size = lambda name: sum(x.nbytes for x in jax.tree.leaves(make_optimizer(OptimizerConfig(name=name), params, 1)[0].init(params)))
    assert size("adam8bit") < 0.3 * size("adamw")


def test_decay_leaves_norms_and_biases_alone_and_groups_override(params):
    config = OptimizerConfig(
        name="sgd", momentum=0.0, learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.5, groups=(ParamGroup("embed", 0.0),)
    )
    after = steps(config, params, 1, loss=lambda p: 0.0 * distance(p))
    np.testing.assert_array_equal(after["blocks.0.mlp_norm.weight"], params["blocks.0.mlp_norm.weight"])
    np.testing.assert_array_equal(after["embed_tokens"], params["embed_tokens"])
    np.testing.assert_allclose(after["blocks.0.mlp.up_proj.weight"], 0.95 * params["blocks.0.mlp.up_proj.weight"], rtol=1e-6)


def test_muon_makes_each_layers_update_orthogonal(params):
    config = OptimizerConfig(name="muon", learning_rate=1.0, lr_scheduler_type="constant")
    after = steps(config, params, 1)
    update = after["blocks.0.mlp.up_proj.weight"] - params["blocks.0.mlp.up_proj.weight"]
    for layer in update:
        values = np.linalg.svd(np.asarray(layer), compute_uv=False)
        assert values.max() / values.min() < 2  # five Newton-Schulz steps bring them between about 0.7 and 1.2
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(layer))), 0.2, rtol=0.2)


def test_a_group_that_fits_nothing_is_refused(params):
    with pytest.raises(ConfigError, match="'nothing' fits no parameter"):
        make_optimizer(OptimizerConfig(groups=(ParamGroup("nothing"),)), params, 1)


def test_schedules():
    at = lambda step, **config: float(make_schedule(OptimizerConfig(learning_rate=1.0, **config), 100)(step))
    assert [at(s, warmup_steps=10) for s in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert at(55, lr_scheduler_type="cosine", warmup_ratio=0.1) == pytest.approx(0.5)
    assert [at(s, lr_scheduler_type="wsd") for s in (0, 79, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    assert at(99, lr_scheduler_type="constant") == 1
    assert at(100, min_lr_ratio=0.1) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="more than the 100 steps"):
        at(0, warmup_steps=101)
