"""The adapter goldens: folders that PEFT wrote, and what it computed with them."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_cases import FOLDER, MODELS

from jaxllm.adapters import is_trainable, prepend_virtual_tokens
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import Model, load_model
from jaxllm.models import Decoder
from jaxllm.models.attention import dense_attend
from jaxllm.sharding import ShardingRules, make_mesh

ADAPTERS = FOLDER / "adapters"
CASES = sorted(path.parent.name for path in ADAPTERS.glob("*/golden.npz"))


@cache
def model(case: str, scan_layers: bool) -> Model:
    folder = Path(MODELS / case)
    return load_model(open_checkpoint(folder), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=scan_layers)


def decoder(case: str, scan_layers: bool) -> Decoder:
    made = model(case, scan_layers)
    return nnx.merge(made.graph, made.params)


def logits_golden(name: str) -> tuple[str, np.ndarray, np.ndarray]:
    with np.load(ADAPTERS / name / "golden.npz") as data:
        return str(data["base"]), data["tokens"], data["logits"]


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """[T, V], of the text's own tokens where virtual ones stand before it."""
    tokens = np.asarray(tokens, np.int32)[None]
    batch = {"tokens": tokens, "positions": np.arange(tokens.size, dtype=np.int32)[None], "segment_ids": np.ones_like(tokens)}
    if decoder.virtual is not None:
        batch = prepend_virtual_tokens(batch, decoder.config, decoder.virtual.count)
    graph, state = nnx.split(decoder, graph=False)
    return np.asarray(_logits(graph, state, batch))[0, -tokens.size :]


@partial(jax.jit, static_argnums=0)
def _logits(graph, state, batch):
    decoder = nnx.merge(graph, state)
    lengths = jnp.full_like(batch["positions"], batch["positions"].shape[-1])
    attend = dense_attend(batch["positions"], batch["segment_ids"])
    return decoder.logits(decoder(batch["tokens"], batch["positions"], attend, rope_lengths=lengths)[0])


def randomised(decoder: Decoder, scale: float = 0.1) -> Decoder:
    """With noise added to all that an adapter trains, as far as it is in use (zeros of layers left out stay zero)."""
    graph, trainable, frozen = nnx.split(decoder, is_trainable, ..., graph=False)
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    noisy = jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape, x.dtype), trainable)
    return nnx.merge(graph, noisy, frozen)
