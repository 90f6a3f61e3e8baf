"""A tiny decoder and batches for the tests of training."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny_models import write_llama

from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.sharding import ShardingRules, make_mesh
from jaxllm.training.objectives import ObjectiveConfig, make_objective
from jaxllm.training.parts import split_model
from jaxllm.training.step import StepConfig, init_state, make_train_step, place_batch

VOCAB = 128


def load(folder: Path, *, dtype=jnp.float32, scan_layers=True, mesh=None, **changes):
    """The decoder of a llama of two layers."""
    if not (folder / "config.json").exists():
        write_llama(folder, **{"num_hidden_layers": 2, "vocab_size": VOCAB, **changes})
    mesh = mesh or make_mesh(None)
    model = load_model(open_checkpoint(folder), dtype=dtype, mesh=mesh, rules=ShardingRules(), scan_layers=scan_layers)
    return nnx.merge(model.graph, model.params)


def rows(lengths: list[list[int]], length: int, seed: int = 0, prompt: int = 2) -> dict[str, np.ndarray]:
    """A batch: for each row the lengths of the examples packed into it; the first `prompt` tokens of each do not count."""
    rng = np.random.default_rng(seed)
    return pack([[rng.integers(1, VOCAB, n) for n in row] for row in lengths], length, prompt)


def pack(examples: list[list[np.ndarray]], length: int, prompt: int = 2) -> dict[str, np.ndarray]:
    ints = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(examples), length), np.int32) for name in ints}
    batch["weights"] = np.zeros((len(examples), length), np.float32)
    for r, row in enumerate(examples):
        start = 0
        for s, tokens in enumerate(row):
            n = len(tokens)
            at = slice(start, start + n)
            batch["tokens"][r, at], batch["segment_ids"][r, at], batch["positions"][r, at] = tokens, s + 1, np.arange(n)
            batch["targets"][r, start : start + n - 1] = tokens[1:]
            batch["weights"][r, start + prompt - 1 : start + n - 1] = 1
            start += n
    return batch


def stacked(*batches):
    """Micro-batches under a leading axis."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


class Run:
    """A model, an optimiser and a step, ready to go."""

    def __init__(self, model, *, tx=None, objective=None, mesh=None, trainable=None, **config):
        self.mesh = mesh or make_mesh(None)
        self.parts, params, self.frozen = split_model(model, trainable)
        tx = tx or optax.sgd(0.1)
        config = StepConfig(**{"max_grad_norm": None, **config})
        objective = objective or make_objective(ObjectiveConfig("sft"))
        self.state = init_state(params, tx, config, 0)
        self.step_fn = make_train_step(self.parts, objective, tx, lambda step: jnp.float32(0.1), config, self.state)

    def step(self, batches):
        self.state, metrics = self.step_fn(self.state, self.frozen, place_batch(batches, self.mesh, ShardingRules()))
        return {name: float(value) for name, value in metrics.items()}

    @property
    def params(self):
        return {name: np.asarray(p, np.float32) for name, p in self.state.params.items()}
