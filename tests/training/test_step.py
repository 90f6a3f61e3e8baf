"""The step: accumulation, packing, remat, precision, sharding, and steps that are not finite."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Run, load, pack, rows, stacked

from jaxllm.sharding import make_mesh
from jaxllm.training.parts import matches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama") / "model"


def close(a, b, rtol):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol * np.abs(a[name]).max(), err_msg=name)


LENGTHS = [[5], [16], [3], [9], [12], [4], [7], [16]]


def test_accumulating_eight_micro_batches_of_uneven_weights_is_one_batch(folder):
    batch = rows(LENGTHS, 16)
    whole, parts = Run(load(folder)), Run(load(folder))
    a = whole.step(stacked(batch))
    b = parts.step({name: value[:, None] for name, value in batch.items()})
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["weight"] == b["weight"]
    close(whole.params, parts.params, 1e-6)


def test_packed_and_unpacked_are_the_same(folder):
    rng = np.random.default_rng(0)
    examples = [rng.integers(1, 128, n) for n in (5, 9, 2, 7, 8, 1)]
    packed, unpacked = Run(load(folder)), Run(load(folder))
    a = packed.step(stacked(pack([examples[:3], examples[3:]], 16)))
    b = unpacked.step(stacked(pack([[e] for e in examples], 16)))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    close(packed.params, unpacked.params, 1e-5)


REMAT = [("full", True), ("full", False), ("dots", True), ("dots_with_no_batch_dims", False)]
SLOW_REMAT = [pytest.param(*case, marks=pytest.mark.slow) for case in [("dots", False), ("dots_with_no_batch_dims", True)]]


@pytest.mark.parametrize(("policy", "scan_layers"), REMAT + SLOW_REMAT)
def test_remat_changes_no_number(folder, policy, scan_layers):
    batch, model = stacked(rows(LENGTHS, 16)), load(folder, scan_layers=scan_layers)
    model.remat = policy
    plain, again = Run(load(folder, scan_layers=scan_layers)), Run(model)
    assert plain.step(batch)["loss"] == pytest.approx(again.step(batch)["loss"], rel=1e-6)
    close(plain.params, again.params, 1e-5)
    assert "remat" in str(again.step_fn.trace(again.state, again.frozen, batch).jaxpr)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_eight_devices_are_one(folder, sizes):
    mesh = make_mesh(None, **sizes)
    one = Run(load(folder), tx=optax.adamw(1e-2))
    many = Run(load(folder, mesh=mesh), tx=optax.adamw(1e-2), mesh=mesh)
    for seed in range(4):
        batch = stacked(rows(LENGTHS, 16, seed), rows(LENGTHS, 16, seed + 100))
        assert one.step(batch)["loss"] == pytest.approx(many.step(batch)["loss"], rel=1e-5)
    placed = many.state.params["blocks.0.mlp.up_proj.weight"]
    assert placed.sharding.shard_shape(placed.shape) == (2, 48 // sizes.get("tensor", 1), 32 // sizes.get("fsdp", 1))
    moments = many.state.opt_state[0].mu["blocks.0.mlp.up_proj.weight"]
    assert moments.sharding == placed.sharding


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(folder):
    run = Run(load(folder), tx=optax.adamw(1e-2))
    good = stacked(rows(LENGTHS, 16))
    run.step(good)
    before = run.params
    bad = dict(good, weights=good["weights"] * np.inf)
    assert run.step(bad)["finite"] == 0
    nothing = dict(good, weights=good["weights"] * 0)
    assert run.step(nothing)["finite"] == 0
    close(before, run.params, 0)
    assert int(run.state.skipped) == 2 and int(run.state.step) == 3 and int(run.state.opt_state[0].count) == 1
    assert run.step(good)["finite"] == 1


@pytest.mark.parametrize("precision, dtype", [("bfloat16_mixed", jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_lower_precision_learns_as_float32_does(folder, precision, dtype):
    batch = stacked(rows(LENGTHS, 16))
    exact = Run(load(folder), tx=optax.adam(3e-3))
    coarse = Run(load(folder, dtype=dtype), tx=optax.adam(3e-3), precision=precision)
    a, b = ([run.step(batch)["loss"] for _ in range(20)] for run in (exact, coarse))
    assert coarse.state.params["embed_tokens"].dtype == dtype
    assert b[-1] == pytest.approx(a[-1], rel=0.05) and a[-1] < 0.7 * a[0]


def test_stochastic_rounding_keeps_updates_too_small_for_bfloat16(folder):
    tx = optax.GradientTransformation(lambda p: (), lambda g, s, p: ({n: 1e-4 * jnp.abs(x) for n, x in p.items()}, s))
    run = Run(load(folder, dtype=jnp.bfloat16), tx=tx, precision="bfloat16")
    before, batch = run.params, stacked(rows(LENGTHS, 16))
    for _ in range(20):
        run.step(batch)
    grown = np.abs(run.params["embed_tokens"] - before["embed_tokens"]).sum() / np.abs(before["embed_tokens"]).sum()
    signed = (run.params["embed_tokens"] - before["embed_tokens"]).sum() / np.abs(before["embed_tokens"]).sum()
    assert signed == pytest.approx(2e-3, rel=0.3) and grown < 0.01


def test_only_what_is_chosen_moves_and_the_average_follows(folder):
    run = Run(load(folder), trainable=matches((r"mlp\.down",)), ema_decay=0.5)
    before = run.params
    assert list(before) == ["blocks.0.mlp.down_proj.weight"]
    run.step(stacked(rows(LENGTHS, 16)))
    after, ema = run.params, np.asarray(run.state.ema["blocks.0.mlp.down_proj.weight"])
    np.testing.assert_allclose(ema, (before["blocks.0.mlp.down_proj.weight"] + after["blocks.0.mlp.down_proj.weight"]) / 2, atol=1e-6)
