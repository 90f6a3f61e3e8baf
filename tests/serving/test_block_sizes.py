"""The kernels' block sizes that were measured on a kind of device: engines there take them, and programs of others are not theirs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from golden_cases import MODELS

from jaxllm import LLM
from jaxllm.errors import ConfigError
from jaxllm.planning import find_topology
from jaxllm.serving.attend import paged_attend
from jaxllm.serving.block_sizes import find_table, table_path
from jaxllm.serving.executables import ExecutableCache
from jaxllm.sharding import ShardingRules, make_mesh
from pallas_kernels.ragged_paged_attention import Table, write_table
from pallas_kernels.ragged_paged_attention.tables import Entry
from pallas_kernels.ragged_paged_attention.tuning import TpuBlocks, Work

pytestmark = pytest.mark.usefixtures("compiled_anew")  # what the engine keeps of its own is looked at
WORK = Work("decode", 8, 2, 128, 64, "bfloat16", "bfloat16")


def table(pages, seconds=1.0, kind="cpu"):
    return Table(kind, (Entry(WORK, TpuBlocks(pages, 1), seconds, 2.0),))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_program_of_other_sizes_is_not_taken(tmp_path):
    compiled = []

    def program(tuned):
        def compile_():
            compiled.append(tuned)
            return jax.jit(lambda x: x + 1).lower(jnp.zeros(2)).compile()

        return ExecutableCache(tmp_path / "programs", make_mesh(), "made from", tuned=tuned).get("a program", compile_)

    for tuned in (None, None, table(4), table(4, seconds=0.5), table(2), table(4), None):
        assert program(tuned)(jnp.zeros(2)).tolist() == [1, 1]
    assert compiled == [None, table(4), table(2)]


def test_an_engine_finds_its_device_s_table(cache):
    options = dict(skip_tokenizer_init=True, warmup=False, max_num_seqs=2, max_num_batched_tokens=32, dtype="float32", num_pages=8)
    sizes = lambda: LLM(MODELS / "llama_gqa", **options).engine.runner.cache.made_from["the kernels' block sizes"]
    assert sizes() == "a heuristic's"
    write_table(table(4, kind="another"), table_path("another"))
    assert sizes() == "a heuristic's"
    write_table(table(4), cache / "kernels" / "cpu.json")
    assert sizes() == table(4).digest


def test_a_table_that_cannot_be_used_is_refused_by_name(cache):
    path = table_path("cpu")
    write_table(table(4, kind="another"), path)
    with pytest.raises(ConfigError, match="cpu.json has block sizes for 'another', and the device is 'cpu'"):
        find_table("cpu")
    path.write_text("{")
    with pytest.raises(ConfigError, match="delete the file, or run jaxllm tune-kernels again: .*cpu.json is not a table"):
        find_table("cpu")


def test_the_sizes_reach_the_kernel():
    """Of a program for a TPU, on whatever devices it is for."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(list(find_topology("v6e:2x2").devices), tensor=2)
    shape = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    wide = partial(shape, dtype=jnp.bfloat16)
    q, k, pages = wide(32, 16, 128), wide(32, 4, 128), wide(99, 2, 4, 64, 128)

    def text(tuned):
        def step(page_table, kv_lens, query_starts, counts, q, k, v, pages):
            options = dict(num_pages=99, mesh=mesh, rules=ShardingRules(), decode_only=True, tuned=tuned)
            attend = paged_attend(page_table, kv_lens, query_starts, counts, **options)
            return attend(q, k, v, pages, 0, scale=1.0, window=None, softcap=None)

        with jax.set_mesh(mesh):
            arrays = shape(32, 64), shape(32), shape(33), shape(2), q, k, k, pages
            return jax.jit(step).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()

    assert text(None) == text(None) != text(table(2))  # a device has 8 of the 16 heads
    assert text(Table("a chip", ())) == text(None)
