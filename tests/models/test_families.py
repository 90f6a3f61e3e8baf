"""Every family against transformers: the logits of whole prompts, in float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import CASES, MODELS, OLD_CONFIGS, golden

from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.models import config_from_hf
from jaxllm.models.attention import dense_attend
from jaxllm.sharding import ShardingRules, make_mesh

# Scanned: patterns of layers that differ, layers without rotation, angles that depend on the length, and the plainest of each kind; the
# others differ from these within a layer only, where they are looked at unrolled.
_SCANNED = ["gemma2", "gemma3_text_5to1", "gpt2", "llama_gqa", "olmo2", "opt_postnorm_proj", "phi3_longrope", "qwen2_window", "smollm3"]


@pytest.mark.parametrize(
    "case, scan_layers",
    [pytest.param(case, False, id=f"{case}-unrolled") for case in CASES]
    + [pytest.param(case, True, id=f"{case}-scanned", marks=() if case in _SCANNED else pytest.mark.slow) for case in CASES],
)
def test_logits(case, scan_layers):
    model = load_model(open_checkpoint(MODELS / case), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=scan_layers)

    @jax.jit
    def logits(params, tokens, length):
        decoder = nnx.merge(model.graph, params)
        positions = jnp.arange(tokens.size)
        lengths = jnp.full_like(positions, length)
        return decoder.logits(decoder(tokens, positions, dense_attend(positions), rope_lengths=lengths)[0])

    for reference in golden(case):
        length = len(reference["prompt"])
        tokens = np.zeros(40, np.int32)  # one shape, one compile: what follows a token does not change it
        tokens[:length] = reference["prompt"]
        ours = logits(model.params, tokens, length)[:length]
        np.testing.assert_allclose(ours, reference["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", OLD_CONFIGS)
def test_configurations_from_before_transformers_5_mean_the_same(case):
    new, old = (config_from_hf(json.loads((MODELS / case / name).read_text())) for name in ("config.json", "config.old.json"))
    assert new == old


def test_batched_rows_and_segments_equal_single_prompts():
    """[B, T] with packed segments gives each example the logits that it has alone."""
    case = "gemma2"
    model = load_model(open_checkpoint(MODELS / case), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules())
    decoder = nnx.merge(model.graph, model.params)
    first, second, third = golden(case)
    lengths = (5, 21)
    tokens = np.concatenate([first["prompt"], second["prompt"]])
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat([1, 2], lengths)
    other = third["prompt"][: len(tokens)]
    batch = jnp.asarray(np.stack([tokens, other])), jnp.asarray(np.stack([positions, np.arange(len(tokens))]))
    attend = dense_attend(batch[1], jnp.asarray(np.stack([segments, np.ones_like(segments)])))
    logits = decoder.logits(decoder(*batch, attend)[0])
    np.testing.assert_allclose(logits[0, :5], first["logits"], atol=1e-4)
    np.testing.assert_allclose(logits[0, 5:], second["logits"], atol=1e-4)
    np.testing.assert_allclose(logits[1], third["logits"][: len(tokens)], atol=1e-4)


def test_gradients_are_finite_and_reach_every_parameter():
    model = load_model(open_checkpoint(MODELS / "qwen3"), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=True)
    tokens = jnp.asarray(golden("qwen3")[1]["prompt"])

    def loss(params):
        decoder, positions = nnx.merge(model.graph, params), jnp.arange(tokens.size)
        logits = decoder.logits(decoder(tokens, positions, dense_attend(positions))[0])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[1:, None], axis=-1).mean()

    for path, gradient in nnx.to_flat_state(jax.grad(loss)(model.params)):
        assert np.isfinite(gradient[...]).all() and np.abs(gradient[...]).max() > 0, path
