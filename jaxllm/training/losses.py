"""Cross-entropy and log-probabilities over the vocabulary, some tokens at a time: `[B, T, vocab]` logits are never made.

Rows are cut along T, so that a batch that is split over devices stays split. All sums are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models import Decoder
from jaxllm.training.backend import ONE_DEVICE, Backend
from pallas_kernels.row_sum import row_sum

_HEAD = ("lm_head", "project_out")

Head = dict[str, Any]  # leaf name -> array


def cross_entropy(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: Backend = ONE_DEVICE,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum over tokens of -log p(target), through the decoder's own `logits`; and the parts of it.

    `label_smoothing` e: (1 - e) of the target's and e of all tokens' mean (Szegedy et al., arXiv 1512.00567, section 7).
    `z_loss` z adds z log(Z)^2 (Chowdhery et al., arXiv 2204.02311, section 5). The parts, `nll` (neither of the two in it) and
    `z_loss`, are sums too, without gradients. The gradient is formed in the forward pass, chunk by chunk: the logits are computed
    once, where recomputing them would cost a fourth product of the size of the vocabulary.
    """
    head, logits_of = _head(model, backend)
    chunks = _chunks(model, hidden.shape, chunk_tokens, backend)
    hs, ts, ws = chunks(hidden), chunks(targets), chunks(weights.astype(jnp.float32))

    def parts(logits: Array, t: Array, w: Array) -> tuple[Array, Array, Array]:
        p, lse = softmax_and_log_sum(logits)
        nll = lse - jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        smooth = nll if not label_smoothing else (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean(-1))
        z = z_loss * jnp.square(lse)
        # A padded token may have any logits, so it is left out and not multiplied by zero.
        sums = [jnp.sum(jnp.where(w != 0, x * w, 0)) for x in (smooth + z, nll, z)]
        return jnp.stack(sums), p, lse

    def slope(p: Array, lse: Array, t: Array, w: Array) -> Array:
        """The gradient with regard to the logits, whose softmax is p."""
        p *= 1 + 2 * z_loss * lse[..., None]
        hit = jax.lax.broadcasted_iota(t.dtype, p.shape, p.ndim - 1) == t[..., None]
        p -= jnp.where(hit, 1 - label_smoothing, 0.0)
        if label_smoothing:
            p -= label_smoothing / p.shape[-1]
        return jnp.where(w[..., None] != 0, p * w[..., None], 0)

    @jax.custom_vjp
    def total(head: Head, hs: Array, ts: Array, ws: Array) -> Array:
        def body(sums, chunk):
            h, t, w = chunk
            return sums + parts(logits_of(head, h), t, w)[0], None

        return jax.lax.scan(body, jnp.zeros(3), (hs, ts, ws))[0]

    def forward(head, hs, ts, ws):
        values = jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_is_primal)
        moved = {name for name, leaf in head.items() if leaf.perturbed}
        fixed = {name: value for name, value in values.items() if name not in moved}
        zeros = {name: jnp.zeros(values[name].shape, jnp.float32) for name in moved}

        def body(carry, chunk):
            sums, grads = carry
            h, t, w = chunk
            logits, pull = jax.vjp(lambda moving, h: logits_of(fixed | moving, h), {name: values[name] for name in moved}, h)
            part, p, lse = parts(logits, t, w)
            dhead, dh = pull(slope(p, lse, t, w))
            return (sums + part, {name: g + dhead[name].astype(jnp.float32) for name, g in grads.items()}), dh

        (sums, grads), dhs = jax.lax.scan(body, (jnp.zeros(3), zeros), (hs.value, ts.value, ws.value))
        return sums, (grads, dhs, fixed)

    def backward(saved, g):
        grads, dhs, fixed = saved
        g = g[0] if not isinstance(g, jax.custom_derivatives.SymbolicZero) else jnp.zeros(())
        dhead = {name: (g * x).astype(dtypes[name]) for name, x in grads.items()}
        return dhead | dict.fromkeys(fixed), (g * dhs).astype(dhs.dtype), None, None

    dtypes = {name: x.dtype for name, x in head.items()}
    total.defvjp(forward, backward, symbolic_zeros=True)
    loss, nll, z = total(head, hs, ts, ws)
    return loss, jax.lax.stop_gradient({"nll": nll, "z_loss": z} if z_loss else {"nll": nll})


def token_log_probs(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    backend: Backend = ONE_DEVICE,
    chunk_tokens: int | None = None,
) -> Float[Array, "B T"]:
    """log p(target) of each token, float32; in the backward pass the logits are computed again."""
    head, logits_of = _head(model, backend)
    chunks = _chunks(model, hidden.shape, chunk_tokens, backend)

    @jax.checkpoint
    def chunk(head, h, t):
        logits = logits_of(head, h)
        hit = jax.lax.broadcasted_iota(t.dtype, logits.shape, logits.ndim - 1) == t[..., None]
        # A masked sum, not a gather, whose transpose would be a scatter into [B, C, vocab].
        return jnp.sum(jnp.where(hit, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(lambda pair: chunk(head, *pair), (chunks(hidden), chunks(targets)))
    return jnp.moveaxis(out, 0, 1).reshape(len(hidden), -1)[:, : hidden.shape[1]]


def softmax_and_log_sum(logits: Float[Array, "*T V"]) -> tuple[Float[Array, "*T V"], Float[Array, "*T"]]:
    """Both from one exponential of each logit."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    p = jnp.exp(logits - top)
    total = row_sum(p)
    return p / total, (top + jnp.log(total))[..., 0]


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _head(model: Decoder, backend: Backend) -> tuple[Head, Callable[[Head, Array], Array]]:
    """The parameters that `model.logits` reads, by name, and that function of them: `(head, hidden) -> logits`."""
    graph, state = nnx.split(model, graph=False)
    flat = list(nnx.to_flat_state(state))
    names = _HEAD if model.lm_head is not None else ("embed_tokens", *_HEAD)
    values = {".".join(map(str, path)): variable.get_value() for path, variable in flat if path[0] in names}
    head = {name: backend.read_often(value) if value.ndim == 2 else value for name, value in values.items()}

    def logits_of(head: Head, hidden: Array) -> Array:
        # The rest of the model is not read, and is there in shape only: nothing that is differentiated is closed over.
        def value(path, variable):
            x = head.get(".".join(map(str, path)))
            return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype) if x is None else x)

        return nnx.merge(graph, nnx.from_flat_state([(path, value(path, variable)) for path, variable in shapes])).logits(hidden)

    shapes = [(path, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype))) for path, variable in flat]
    return head, logits_of


def _chunks(model: Decoder, shape: tuple[int, ...], chunk_tokens: int | None, backend: Backend) -> Callable[[Array], Array]:
    """Cuts [B, T, ...] into [chunks, B, T / chunks, ...], with zeros after the last token where T does not divide."""
    rows, length = shape[:2]
    tokens = chunk_tokens or max(128, backend.logits_alive // model.config.vocab_size)
    count = -(-length // max(1, min(length, tokens // -(-rows // backend.row_shards))))
    size = -(-length // count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    return cut
