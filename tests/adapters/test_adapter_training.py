"""Adapters under training: gradients of what is trained alone, through scan and remat, and descent that moves nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import decoder, logits, randomised
from flax import nnx

from jaxllm.adapters import (
    AdapterParam,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SavedParam,
    adapter_disabled,
    adapter_tensors,
    add_adapter,
    is_trainable,
    merge_adapter,
    prepend_virtual_tokens,
    quantize_base,
    set_tensors,
    unmerge_adapter,
    with_dropout,
)
from jaxllm.adapters.quantize import QuantizedLinear
from jaxllm.errors import ConfigError
from jaxllm.models.attention import dense_attend

TOKENS = np.random.default_rng(0).integers(3, 100, (2, 12)).astype(np.int32)
ATTENTION = ("q_proj", "v_proj")


def batch_of(model):
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    weights = np.ones((2, 12), np.float32)
    weights[:, -1] = 0
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1), "weights": weights, "positions": positions}
    batch["segment_ids"] = np.ones_like(TOKENS)
    return batch if model.virtual is None else prepend_virtual_tokens(batch, model.config, model.virtual.count)


def loss_of(model, batch):
    hidden, _ = model(batch["tokens"], batch["positions"], dense_attend(batch["positions"], batch["segment_ids"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), batch["targets"])
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


def train(model, steps=5, key=None, rate=0.02):
    graph, trainable, frozen = nnx.split(model, is_trainable, ..., graph=False)
    batch, optimizer = batch_of(model), optax.adam(rate)

    @jax.jit
    def step(trainable, frozen, opt_state, number):
        def objective(trainable):
            its = nnx.merge(graph, trainable, frozen)
            return loss_of(its if key is None else with_dropout(its, jax.random.fold_in(key, number)), batch)

        loss, grads = jax.value_and_grad(objective)(trainable)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss, grads

    opt_state, losses = optimizer.init(trainable), []
    for i in range(steps):
        trainable, opt_state, loss, grads = step(trainable, frozen, opt_state, i)
        losses.append(float(loss))
    return nnx.merge(graph, trainable, frozen), losses, grads


CONFIGS = {
    "lora": ("llama_gqa", LoraConfig(r=4, target_modules="all-linear")),
    "lora_some_layers": ("llama_gqa", LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=(1,), rank_pattern={"v_proj": 2})),
    "lora_and_modules": ("llama_gqa", LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=("lm_head", "embed_tokens"))),
    "dora_some_layers": ("qwen3", LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, layers_to_transform=(0, 2))),
    "fused": ("phi3", LoraConfig(r=4, target_modules=("qkv_proj", "gate_up_proj", "o_proj"))),
    "fused_dora": ("gpt2", LoraConfig(r=4, target_modules=("c_attn",), use_dora=True)),
    "ia3": ("llama_gqa", IA3Config(target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",))),
    "prompt": ("llama_gqa", PromptTuningConfig(num_virtual_tokens=3)),
    "prefix": ("llama_gqa", PrefixTuningConfig(num_virtual_tokens=3)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_moves_only_what_is_trainable(name):
    case, config = CONFIGS[name]
    base = decoder(case, scan_layers=True)
    start = add_adapter(base, config, rngs=nnx.Rngs(0))
    if name not in ("prompt", "prefix"):
        np.testing.assert_allclose(logits(start, TOKENS[0]), logits(base, TOKENS[0]), atol=1e-4)  # an adapter begins as nothing
    tuned, losses, grads = train(start)
    assert losses[-1] < losses[0] - 0.01
    for (path, before), (_, after) in zip(*(nnx.to_flat_state(nnx.split(m, graph=False)[1]) for m in (start, tuned)), strict=True):
        moved = bool(jnp.any(before[...] != after[...])) if jnp.issubdtype(before.dtype, jnp.floating) else False
        assert moved == isinstance(before, (AdapterParam, SavedParam)), path
    np.testing.assert_array_equal(logits(adapter_disabled(tuned), TOKENS[0]), logits(base, TOKENS[0]))
    if name == "lora_some_layers":  # what is left out of the stack has neither gradient nor weight
        a, b = tuned.blocks[0].self_attn.q_proj.adapter.lora_A[...], tuned.blocks[0].self_attn.v_proj.adapter.lora_B[...]
        assert not a[0].any() and not a[2].any() and a[1].all() and b.shape[-1] == 2


@pytest.mark.parametrize("name", ["lora", "dora_some_layers", "fused"])
def test_gradients_of_stacked_layers_with_remat_equal_those_of_unrolled_ones(name):
    case, config = CONFIGS[name]
    unrolled = randomised(add_adapter(decoder(case, False), config, rngs=nnx.Rngs(0)))
    stacked = add_adapter(decoder(case, True), config, rngs=nnx.Rngs(0))
    set_tensors(stacked, config, adapter_tensors(unrolled, config))
    stacked.remat = "full"

    def gradients(model):
        graph, trainable, frozen = nnx.split(model, is_trainable, ..., graph=False)
        batch = batch_of(model)
        grads = jax.jit(jax.grad(lambda t, f: loss_of(nnx.merge(graph, t, f), batch)))(trainable, frozen)
        return adapter_tensors(nnx.merge(graph, grads, frozen), config)

    expected, found = gradients(unrolled), gradients(stacked)
    assert expected.keys() == found.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-5, rtol=1e-4, err_msg=key)


def test_dropout_depends_on_the_key_and_is_off_without_one():
    config = LoraConfig(r=4, target_modules=ATTENTION, lora_dropout=0.5)
    model = randomised(add_adapter(decoder("llama_gqa", True), config, rngs=nnx.Rngs(0)))
    off = logits(model, TOKENS[0])
    one, again, other = (logits(with_dropout(model, jax.random.key(i)), TOKENS[0]) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01 and np.abs(one - off).max() > 0.01
    np.testing.assert_array_equal(logits(model, TOKENS[0]), off)
    assert train(model, key=jax.random.key(0))[1][-1] < train(model, steps=1)[1][0]


@pytest.mark.parametrize("method, double", [("nf4", False), ("nf4", True), ("int8", False)])
def test_quantised_base_trains_merges_and_stays_frozen(method, double):
    base = decoder("llama_gqa", True)
    quantised = quantize_base(base, method, double_quant=double)
    assert isinstance(quantised.blocks[0].mlp.up_proj, QuantizedLinear) and not isinstance(quantised.lm_head, QuantizedLinear)
    start = add_adapter(quantised, CONFIGS["lora"][1], rngs=nnx.Rngs(0))
    tuned, losses, _ = train(start)
    assert losses[-1] < losses[0] - 0.05
    before, after = start.blocks[0].mlp.up_proj.base, tuned.blocks[0].mlp.up_proj.base
    np.testing.assert_array_equal(before.codes[...], after.codes[...])
    merged = merge_adapter(tuned, dtype=jnp.float32)
    np.testing.assert_allclose(logits(merged, TOKENS[0]), logits(tuned, TOKENS[0]), atol=1e-4)
    assert merge_adapter(tuned).blocks[0].mlp.up_proj.weight.dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="unload"):
        merge_adapter(tuned, unload=False)


def test_dora_on_a_quantised_base_begins_as_the_base():
    quantised = quantize_base(decoder("qwen3", True), "nf4")
    start = add_adapter(quantised, CONFIGS["dora_some_layers"][1], rngs=nnx.Rngs(0))
    np.testing.assert_allclose(logits(start, TOKENS[0]), logits(quantised, TOKENS[0]), atol=1e-4)


def test_axes_place_every_new_parameter():
    """rules.spec takes each parameter's axes, stacked ones after "layers": their number must be the array's."""
    for (case, config), quantise in itertools.product(CONFIGS.values(), (None, "nf4", "int8")):
        model = decoder(case, True)
        model = quantize_base(model, quantise) if quantise else model
        state = nnx.split(nnx.eval_shape(lambda: add_adapter(model, config, rngs=nnx.Rngs(0)), graph=False), graph=False)[1]  # noqa: B023
        for path, variable in nnx.to_flat_state(state):
            stacked = 1 if path[0] == "blocks" else 0
            assert len(variable.logical_axes) <= len(variable.shape) - stacked, path
            if isinstance(variable, AdapterParam):
                assert len(variable.logical_axes) == len(variable.shape) - stacked, path


def test_what_cannot_be_is_refused():
    model = decoder("llama_mha_tied", True)
    lora = LoraConfig(target_modules=ATTENTION)
    for config, named in (
        (LoraConfig(target_modules=("lm_head",)), "lm_head"),
        (LoraConfig(target_modules=ATTENTION, modules_to_save=("lm_head",)), "lm_head"),
        (LoraConfig(target_modules=ATTENTION, modules_to_save=("embed_tokens",)), "tied"),
        (LoraConfig(target_modules=ATTENTION, modules_to_save=("layers.1.mlp",)), "scan_layers=False"),
        (LoraConfig(target_modules="nothing"), "nothing"),
    ):
        with pytest.raises(ConfigError, match=named):
            add_adapter(model, config, rngs=nnx.Rngs(0))
    adapted = add_adapter(model, lora, rngs=nnx.Rngs(0))
    for wrong in (
        lambda: add_adapter(adapted, lora, rngs=nnx.Rngs(0)),
        lambda: quantize_base(adapted, "nf4"),
        lambda: unmerge_adapter(adapted),
        lambda: adapter_disabled(merge_adapter(adapted, unload=False)),
        lambda: add_adapter(decoder("gemma2", True), PromptTuningConfig(), rngs=nnx.Rngs(0)),
        lambda: merge_adapter(add_adapter(model, PrefixTuningConfig(), rngs=nnx.Rngs(0))),
        lambda: LoraConfig(bias="all"),
        lambda: LoraConfig(init_lora_weights="pissa"),
        lambda: LoraConfig(lora_dropout=1.0),
        lambda: LoraConfig(target_modules="q_proj", layers_to_transform=(0,)),
        lambda: IA3Config(target_modules=("k_proj",), feedforward_modules=("down_proj",)),
        lambda: prepend_virtual_tokens({"segment_ids": np.array([[1, 2]])}, model.config, 2),
    ):
        with pytest.raises(ConfigError):
            wrong()
