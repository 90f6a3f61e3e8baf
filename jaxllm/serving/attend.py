"""The serving engine's `attend`: ragged tokens over the page pool."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxllm.models.layers import Attend
from jaxllm.sharding import ShardingRules
from pallas_kernels.ragged_paged_attention import best_implementation, ragged_paged_attention


def paged_attend(
    page_table, kv_lens, query_starts, counts, *, num_pages: int, mesh: Mesh, rules: ShardingRules, decode_only: bool
) -> Attend:
    """`attend` for a step whose sequences are described as in `ragged_paged_attention`; the cache is its `kv_pages`.

    Each device attends with its own heads: nothing crosses between devices here.
    """
    shards = 1 if rules.heads is None else mesh.shape[rules.heads]
    platform = mesh.devices.flat[0].platform  # of the devices that the program is for, which may not be here

    def attend(q, k, v, kv_pages, layer, *, scale, window, softcap):
        if k.shape[1] < shards:  # fewer key/value heads than devices: repeat them, one to a device
            k, v = (jnp.repeat(t, shards // t.shape[1], axis=1) for t in (k, v))
        implementation = best_implementation(platform, *kv_pages.shape[3:], kv_pages.dtype)
        options = dict(scale=scale, window=window, softcap=softcap, decode_only=decode_only, implementation=implementation)
        op = partial(ragged_paged_attention, **options)
        if shards > 1:
            heads, pages, whole = PartitionSpec(None, rules.heads), PartitionSpec(None, None, rules.heads), PartitionSpec()
            op = jax.shard_map(
                op, mesh=mesh, in_specs=(heads, heads, heads, pages, whole, whole, whole, whole), out_specs=(heads, pages), check_vma=False
            )
        table = page_table + jnp.asarray(layer, jnp.int32) * num_pages
        return op(q, k, v, kv_pages, table, kv_lens, query_starts, counts)

    return attend
