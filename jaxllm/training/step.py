"""One optimiser step: gradients as float32 sums over micro-batches, divided once by what they weigh."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.sharding import ShardingRules

Objective = Callable[[nnx.Module, Any, jax.Array], tuple[Array, Array, dict[str, tuple[Array, Array]]]]
Precision = Literal["float32", "bfloat16", "pure_bfloat16"]


class TrainState(NamedTuple):
    """All that a step changes. `skipped`: steps left out because a gradient was not finite."""

    trainable: nnx.State
    optimizer: optax.OptState
    key: Array  # key data: it is saved as numbers
    step: Int[Array, ""]
    skipped: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Sums over a step's examples. `metrics`: what the objective told, each (sum, weight)."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grad_norm: Float[Array, ""]
    metrics: dict[str, tuple[Array, Array]]


def init_state(trainable: nnx.State, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step: the optimiser's moments are placed like the parameters that they are of."""
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(optimizer.init, trainable)
    like = lambda moment, param: param.sharding if moment.shape == param.shape else whole
    places = optax.tree_map_params(optimizer, like, shapes, trainable, transform_non_params=lambda _: whole)
    scalar = lambda: jax.device_put(jnp.zeros((), jnp.int32), whole)
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), whole)
    return TrainState(trainable, jax.jit(optimizer.init, out_shardings=places)(trainable), key, scalar(), scalar())


def make_train_step(
    graph: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    *,
    max_grad_norm: float | None = None,
    precision: Precision = "float32",
) -> Callable[[TrainState, nnx.State, Any], tuple[TrainState, StepMetrics]]:
    """A jitted `step(state, frozen, batches)`, which gives up its state and returns the next, placed as `state` is now.
    `batches`: the objective's batch with a leading axis of micro-batches, [A, B, ...].

    The gradient is that of sum(loss) / sum(weight) over all micro-batches, so it does not depend on how they are cut. A step
    whose loss or gradient is not finite changes nothing but `skipped`. `precision`: bfloat16 multiplies in bfloat16 what is
    kept in float32; pure_bfloat16 keeps bfloat16 too, and rounds each update up or down at random, in proportion (stochastic
    rounding), so that small ones are not lost.
    """
    compute = None if precision == "float32" else jnp.bfloat16  # pure bfloat16 still has its float32: an adapter's, say

    def loss(trainable, frozen, batch, key):
        model = nnx.merge(graph, *(_cast(part, compute) for part in (trainable, frozen)))
        loss_sum, weight_sum, metrics = objective(model, batch, key)
        return loss_sum.astype(jnp.float32), (weight_sum.astype(jnp.float32), metrics)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def one(trainable, frozen, batch, key):
        (loss_sum, (weight_sum, metrics)), grads = gradient(trainable, frozen, batch, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss_sum, weight_sum, metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    def step(state: TrainState, frozen: nnx.State, batches: Any) -> tuple[TrainState, StepMetrics]:
        key = jax.random.wrap_key_data(state.key)
        key, now = jax.random.split(key)
        count = jax.tree.leaves(batches)[0].shape[0]
        if count == 1:
            grads, loss_sum, weight_sum, metrics = one(state.trainable, frozen, jax.tree.map(lambda x: x[0], batches), now)
        else:
            keys = jax.random.split(now, count)
            first = jax.eval_shape(one, state.trainable, frozen, jax.tree.map(lambda x: x[0], batches), now)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
            add = lambda sums, x: (jax.tree.map(jnp.add, sums, one(state.trainable, frozen, *x)), None)
            (grads, loss_sum, weight_sum, metrics), _ = jax.lax.scan(add, zeros, (batches, keys))
        scale = 1 / jnp.maximum(weight_sum, 1e-9)
        norm = optax.global_norm(grads) * scale
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(norm)
        clip = 1.0 if max_grad_norm is None else jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        grads = jax.tree.map(lambda g: g * (scale * clip), grads)
        # optax's own clipping and skipping wrap the optimiser's state; here it stays what others expect in a checkpoint.
        updates, opt = optimizer.update(grads, state.optimizer, state.trainable)
        rounding = jax.random.fold_in(now, 1) if precision == "pure_bfloat16" else None
        trainable = _apply(state.trainable, updates, rounding)
        keep = lambda new, old: jnp.where(finite, new, old)
        trainable, opt = jax.tree.map(keep, (trainable, opt), (state.trainable, state.optimizer))
        skipped = state.skipped + ~finite
        new = TrainState(trainable, opt, jax.random.key_data(key), state.step + 1, skipped)
        return new, StepMetrics(loss_sum, weight_sum, norm, metrics)

    return step


def make_eval_step(graph: nnx.GraphDef, objective: Objective, *, precision: Precision = "float32") -> Callable[..., StepMetrics]:
    """A jitted `step(trainable, frozen, batch, key)` that changes nothing; its grad_norm is 0."""
    compute = None if precision == "float32" else jnp.bfloat16

    @jax.jit
    def step(trainable: nnx.State, frozen: nnx.State, batch: Any, key: jax.Array) -> StepMetrics:
        model = nnx.merge(graph, *(_cast(part, compute) for part in (trainable, frozen)))
        loss_sum, weight_sum, metrics = objective(model, batch, key)
        return StepMetrics(loss_sum, weight_sum, jnp.zeros(()), metrics)

    return step


def place_batch(batch: Any, mesh: Mesh, rules: ShardingRules, *, micro_batches: bool = True) -> Any:
    """A batch of numpy arrays on the mesh: [A, B, ...] with `micro_batches` else [B, ...], B split over the rules' batch axes."""
    spec = rules.spec((None, "batch") if micro_batches else ("batch",))
    return jax.device_put(batch, NamedSharding(mesh, spec))


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree
    # Parameters only: the scales of a quantised base are no weights.
    wanted = lambda v: isinstance(v, nnx.Param) and v.dtype == jnp.float32
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda v: v.replace(v[...].astype(dtype)) if wanted(v) else v, tree, is_leaf=is_variable)


def _apply(params: Any, updates: Any, key: jax.Array | None) -> Any:
    """params + updates in the parameters' own types; with a key, bfloat16 is rounded stochastically."""
    leaves, tree = jax.tree.flatten(params)
    keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))

    def add(p, u, key):
        if key is None or p.dtype != jnp.bfloat16:
            return (p + u).astype(p.dtype)
        return round_stochastically(p + u.astype(jnp.float32), key)

    return jax.tree.unflatten(tree, [add(*x) for x in zip(leaves, jax.tree.leaves(updates), keys, strict=True)])


def round_stochastically(x: Float[Array, "*S"], key: jax.Array) -> Float[Array, "*S"]:
    """float32 to one of the two nearest bfloat16, at random so that the mean is x (Gupta et al., arXiv 1502.02551, section 3)."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
