"""Losses in chunks against the same written out over whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models import Decoder, LayerConfig, ModelConfig
from jaxllm.training.losses import cross_entropy, token_log_probs

B, T, V, D = 3, 11, 37, 16


def head(**changes) -> Decoder:
    config = dict(family="llama", vocab_size=V, hidden_size=D, intermediate_size=8, num_heads=2, num_kv_heads=1, head_dim=8)
    layers = (LayerConfig(rope=None),)
    model = Decoder(ModelConfig(**config, layers=layers, max_positions=16, **changes), rngs=nnx.Rngs(0))
    return model


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)) * 20, jnp.float32)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) > 0.3), jnp.float32)
    return hidden, jnp.asarray(rng.integers(0, V, (B, T))), weights


def written_out(model, hidden, targets, weights, label_smoothing=0.0, z_loss=0.0):
    logits = model.logits(hidden)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    return jnp.sum(weights * (loss + z_loss * jax.nn.logsumexp(logits, -1) ** 2)), jnp.sum(weights * nll)


def with_gradients(loss, model, hidden):
    graph, state = nnx.split(model, graph=False)
    f = lambda state, hidden: loss(nnx.merge(graph, state), hidden)
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(state, hidden)


HEADS = [{"tie_embeddings": True}, {}, {"final_softcap": 2.0}, {"embed_dim": 12, "tie_embeddings": True}]


@pytest.mark.parametrize("changes", HEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
def test_cross_entropy_and_its_gradients(batch, changes, options):
    hidden, targets, weights = batch
    model = head(**changes)
    chunked = lambda m, h: cross_entropy(m, h, targets, weights, chunk_tokens=12, **options)
    (loss, parts), grads = with_gradients(chunked, model, hidden)
    (expected, nll), expected_grads = with_gradients(lambda m, h: written_out(m, h, targets, weights, **options), model, hidden)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(parts["nll"], nll, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)


def test_head_that_is_fixed_gets_no_gradient_and_hidden_does(batch):
    hidden, targets, weights = batch
    model = head()
    grad = jax.grad(lambda h: cross_entropy(model, h, targets, weights, chunk_tokens=6)[0])(hidden)
    expected = jax.grad(lambda h: written_out(model, h, targets, weights)[0])(hidden)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_no_weight_may_hold_anything(batch):
    hidden, targets, weights = batch
    loss = lambda h: cross_entropy(head(), h, targets, weights)[0]
    value, grad = jax.value_and_grad(loss)(jnp.where(weights[..., None] == 0, jnp.nan, hidden))
    assert np.isfinite(value) and np.isfinite(grad).all()
    np.testing.assert_allclose(value, loss(hidden), rtol=1e-6)


def test_log_probs_of_tokens(batch):
    hidden, targets, _ = batch
    model = head(final_softcap=3.0)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((B, T)), jnp.float32)
    ours = lambda m, h: (jnp.sum(g * token_log_probs(m, h, targets, chunk_tokens=9)), None)
    theirs = lambda m, h: (jnp.sum(g * jnp.take_along_axis(jax.nn.log_softmax(m.logits(h)), targets[..., None], -1)[..., 0]), None)
    (value, _), grads = with_gradients(ours, model, hidden)
    (expected, _), expected_grads = with_gradients(theirs, model, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)


def test_whole_logits_are_never_made(batch):
    hidden, targets, weights = batch
    model = head()
    text = str(jax.make_jaxpr(jax.grad(lambda h: cross_entropy(model, h, targets, weights, chunk_tokens=6)[0]))(hidden))
    assert f"{B},2,{V}" in text and f"{B},{T},{V}" not in text
