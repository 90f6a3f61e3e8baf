"""The serving engine's `attend`: ragged tokens over the page pool."""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.models.layers import Attend
from jaxllm.sharding import ShardingRules
from pallas_kernels.ragged_paged_attention import Table, best_implementation, ragged_paged_attention, unsupported

logger = logging.getLogger(__name__)


def paged_attend(
    page_table, kv_lens, query_starts, counts, *, num_pages: int, mesh: Mesh, rules: ShardingRules, decode_only: bool,
    backend: str = "auto", tuned: Table | None = None,
) -> Attend:  # fmt: skip
    """`attend` for a step whose sequences are described as in `ragged_paged_attention`; the cache is its `kv_pages`.

    `backend`: auto, or an implementation that is to be taken whatever the device is (ConfigError where it cannot be).
    `tuned`: the kernels' block sizes on these devices, if they were measured.
    Each device attends with its own heads: nothing crosses between devices here.
    """
    shards = 1 if rules.heads is None else mesh.shape[rules.heads]
    device = mesh.devices.flat[0]  # one that the program is for, which may not be here

    def attend(q, k, v, kv_pages, layer, *, scale, window, softcap):
        if k.shape[1] < shards:  # fewer key/value heads than devices: repeat them, one to a device
            k, v = (jnp.repeat(t, shards // t.shape[1], axis=1) for t in (k, v))
        implementation = _implementation(backend, device, *kv_pages.shape[3:], kv_pages.dtype)
        options = dict(scale=scale, window=window, softcap=softcap, decode_only=decode_only)
        op = partial(ragged_paged_attention, **options, implementation=implementation, tuned=tuned)
        if shards > 1:
            heads, pages, whole = PartitionSpec(None, rules.heads), PartitionSpec(None, None, rules.heads), PartitionSpec()
            op = jax.shard_map(
                op, mesh=mesh, in_specs=(heads, heads, heads, pages, whole, whole, whole, whole), out_specs=(heads, pages), check_vma=False
            )
        table = page_table + jnp.asarray(layer, jnp.int32) * num_pages
        return op(q, k, v, kv_pages, table, kv_lens, query_starts, counts)

    return attend


@cache
def _implementation(backend: str, device: jax.Device, page_size: int, width: int, dtype) -> str:
    """The one asked for, or the best on a device; says once why that is not the device's own kernels, where it is not."""
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if backend != "auto":
        reason = unsupported(backend, page_size, width, dtype, capability)
        if backend not in ("xla", device.platform):
            reason = f"its kernels do not run on {device.device_kind}"
        if reason:
            raise ConfigError(f"attention_backend={backend!r}: {reason}; auto and xla run everywhere")
        return backend
    chosen = best_implementation(device.platform, page_size, width, dtype, capability)
    if chosen == "xla" and device.platform in ("tpu", "gpu"):
        reason = unsupported(device.platform, page_size, width, dtype, capability)
        logger.warning("attention runs without the kernels for %s, slower: %s", device.device_kind, reason)
    return chosen
