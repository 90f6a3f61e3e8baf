"""What is read out of compiled programs, from programs of which it is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.planning.chips import CHIPS
from jaxllm.planning.hlo import Collective, Program, memory
from jaxllm.sharding import make_mesh
from pallas_kernels.ragged_paged_attention import xla


@pytest.fixture(scope="module")
def compiled():
    """Ten turns of a product whose sum is over four devices, and one such product after them."""
    mesh = make_mesh(tensor=4)
    split = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split(None, "tensor"))
    w = jax.ShapeDtypeStruct((10, 64, 64), jnp.float32, sharding=split(None, "tensor"))

    def f(x, w):
        turn = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split(None, "tensor")), None)
        x, _ = jax.lax.scan(turn, x, w)
        return x @ w[0]

    return jax.jit(f, out_shardings=split()).lower(x, w).compile()


def test_loops_are_counted_as_often_as_they_run(compiled):
    cost = Program(compiled.as_text()).cost()
    assert cost.list_collectives() == [Collective("all-reduce", 11, 11 * 8 * 64 * 4)]
    weights = 11 * 64 * 64 * 4 // 4  # a quarter of each turn's, read once
    assert weights < cost.hbm_bytes < 6 * weights  # the CPU's program also copies each slice, and turns it round


def test_memory_is_of_one_device(compiled):
    held = memory(compiled)
    assert held["arguments"] == (8 * 64 + 10 * 64 * 64) * 4 // 4 and held["results"] == 8 * 64 * 4


# As the TPU's compiler writes it: S(1) is vector memory, a fusion takes a slice of its operand, a kernel brings its own estimate.
TEXT = """HloModule step, is_scheduled=true

%fused_slice (p0: bf16[32,64,128], p1: s32[]) -> bf16[1,64,128] {
  %p0 = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%whole (q0: bf16[64,128]) -> bf16[64,128] {
  %q0 = bf16[64,128]{1,0} parameter(0)
  ROOT %view = bf16[64,128]{1,0} bitcast(%q0)
}

%update (u0: f32[100,8], u1: f32[1,8], u2: s32[]) -> f32[100,8] {
  %u0 = f32[100,8]{1,0} parameter(0)
  %u1 = f32[1,8]{1,0} parameter(1)
  %u2 = s32[] parameter(2)
  ROOT %updated = f32[100,8]{1,0} dynamic-update-slice(%u0, %u1, %u2, %u2)
}

%body (arg: (s32[], bf16[32,64,128])) -> (s32[], bf16[32,64,128]) {
  %arg = (s32[]{:T(128)}, bf16[32,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %taken = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %kernel = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%taken), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"500"}}
  %sum = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%kernel), channel_id=1, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, /*index=1*/bf16[32,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %w)
}

%condition (carg: (s32[], bf16[32,64,128])) -> pred[] {
  %carg = (s32[], bf16[32,64,128]) parameter(0)
  %ci = s32[] get-tuple-element(%carg), index=0
  %n = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%ci, %n), direction=LT
}

%cheap (c: f32[100,8]) -> f32[100,8] {
  ROOT %c = f32[100,8]{1,0} parameter(0)
}

%dear (d: f32[100,8]) -> f32[100,8] {
  %d = f32[100,8]{1,0} parameter(0)
  ROOT %copied = f32[100,8]{1,0} copy(%d)
}

ENTRY %main (a: s32[], b: bf16[32,64,128], t: f32[100,8], r: f32[1,8], h: bf16[64,128], p: pred[]) -> f32[100,8] {
  %a = s32[]{:T(128)} parameter(0)
  %b = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %t = f32[100,8]{1,0} parameter(2)
  %r = f32[1,8]{1,0} parameter(3)
  %h = bf16[64,128]{1,0} parameter(4)
  %p = s32[] parameter(5)
  %init = (s32[]{:T(128)}, bf16[32,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%a, %b)
  %loop = (s32[]{:T(128)}, bf16[32,64,128]{2,1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  %written = f32[100,8]{1,0} fusion(%t, %r, %a), kind=kLoop, calls=%update
  %fetch = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%h)
  %fetched = bf16[64,128]{1,0:S(1)} copy-done(%fetch)
  ROOT %chosen = f32[100,8]{1,0} conditional(%p, %written, %written), branch_computations={%dear, %cheap}
}
"""


def test_bytes_between_hbm_and_the_chip():
    cost = Program(TEXT).cost()
    turn = 64 * 128 * 2 + 4 + 500  # the slice, the counter (a parameter in HBM), and what the kernel says
    update = 2 * 8 * 4 + 4  # a row is read and one written
    assert cost.hbm_bytes == 32 * turn + update + 64 * 128 * 2
    assert cost.kernel_flops == 32 * 1000
    assert cost.list_collectives() == [Collective("all-reduce", 32, 32 * 8 * 128 * 2)]


SCATTER = """HloModule write, is_scheduled=true

%rows (s0: bf16[64,2048,256], s1: s32[64,2], s2: bf16[64,256]) -> bf16[64,2048,256] {
  %s0 = bf16[64,2048,256]{2,1,0} parameter(0)
  %s1 = s32[64,2]{1,0} parameter(1)
  %s2 = bf16[64,256]{1,0} parameter(2)
  ROOT %set = bf16[64,2048,256]{2,1,0} scatter(%s0, %s1, %s2), update_window_dims={1}, to_apply=%take
}

ENTRY %main (cache: bf16[64,2048,256], at: s32[64,2], new: bf16[64,256]) -> bf16[64,2048,256] {
  %cache = bf16[64,2048,256]{2,1,0} parameter(0)
  %at = s32[64,2]{1,0} parameter(1)
  %new = bf16[64,256]{1,0} parameter(2)
  ROOT %written = WRITE
}
"""


@pytest.mark.parametrize("write", ["fusion(%cache, %at, %new), kind=kCustom, calls=%rows", "scatter(%cache, %at, %new), to_apply=%take"])
def test_rows_written_in_place_are_not_the_whole_cache(write):
    text = SCATTER.replace("WRITE", "bf16[64,2048,256]{2,1,0} " + write)
    assert Program(text).cost().hbm_bytes == 2 * 64 * 256 * 2 + 64 * 2 * 4  # the rows read and written, and where they go


def test_room_that_is_made_moves_nothing():
    room = 'ENTRY %main () -> bf16[64,128] {\n  ROOT %room = bf16[64,128]{1,0} custom-call(), custom_call_target="TARGET"\n}\n'
    assert Program(room.replace("TARGET", "AllocateBuffer")).cost().hbm_bytes == 0
    assert Program(room.replace("TARGET", "another")).cost().hbm_bytes == 64 * 128 * 2


VIEW = """%retiled (r0: bf16[28,64,128]) -> bf16[28,64,128] {
  %r0 = bf16[28,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %turned = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} copy(%r0)
}

%layer (v0: bf16[28,64,128], v1: s32[]) -> bf16[1,64,128] {
  %v0 = bf16[28,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %v1 = s32[] parameter(1)
  %view = bf16[28,64,128]{2,1,0:T(8,128)(2,1)} fusion(%v0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
  ROOT %one = bf16[1,64,128]{2,1,0:S(1)} dynamic-slice(%view, %v1, %v1, %v1), dynamic_slice_sizes={1,64,128}
}

ENTRY %main (weights: bf16[28,64,128], at: s32[]) -> bf16[1,64,128] {
  %weights = bf16[28,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %at = s32[] parameter(1)
  ROOT %taken = bf16[1,64,128]{2,1,0:S(1)} fusion(%weights, %at), kind=kLoop, calls=%layer
}
"""


def test_a_layer_of_retiled_weights_is_one_layer():
    assert Program(VIEW).cost().hbm_bytes == 64 * 128 * 2 + 4  # and its number


def test_the_compilers_estimate_counts_loops_and_bounds_what_it_leaves_out():
    lines = TEXT.replace("calls=%update\n", 'calls=%update, backend_config={"estimated_cycles":"7000"}\n')
    lines = lines.replace("to_apply=%add\n", 'to_apply=%add, backend_config={"estimated_cycles":"100"}\n')
    cost, whole = Program(lines).cost(), Program(TEXT).cost()
    assert cost.cycles == 32 * 100 + 7000
    assert cost.unestimated_bytes == cost.hbm_bytes - (2 * 8 * 4 + 4)
    chip = CHIPS["v5e"]
    assert cost.compiler_s(chip) == pytest.approx(10200 / 1.503e9 + cost.unestimated_bytes / 819e9, rel=1e-3)
    assert whole.compiler_s(chip) is None and cost.compiler_s(CHIPS["h100"]) is None


# As the GPU's compiler writes it: a Triton kernel's estimate is in its metadata, and S(1) is device memory for collectives.
GPU_TEXT = r"""HloModule step, is_scheduled=true

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %kernel = bf16[64,128]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={ir = "ML\EFR(", serialized_metadata = "{\22flops\22: \2270\22, \22bytes_accessed\22: \2250\22}"}
  ROOT %copied = bf16[64,128]{1,0:S(1)} copy(%kernel)
}
""".replace("\\\n", "")


def test_programs_of_gpus():
    cost = Program(GPU_TEXT, "gpu").cost()
    assert cost.kernel_flops == 70 and cost.hbm_bytes == 50 + 2 * 64 * 128 * 2
    assert Program(GPU_TEXT).cost().hbm_bytes == 50 + 64 * 128 * 2


# As v7x's programs have it: what its sparse cores do meanwhile, a sum over chips here, is a call that is begun, given its operands, ended.
ASYNC = """HloModule step, is_scheduled=true

%on_sparse_cores (s0: bf16[64,128]) -> bf16[64,128] {
  %s0 = bf16[64,128]{1,0} parameter(0)
  ROOT %sum = bf16[64,128]{1,0} all-reduce(%s0), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %begun = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%on_sparse_cores
  %given = ((bf16[64,128]{1,0}), bf16[64,128]{1,0}) call-update(%begun, %a)
  ROOT %ended = bf16[64,128]{1,0} call-done(%given)
}
"""


def test_what_runs_meanwhile_is_counted_once():
    cost = Program(ASYNC).cost()
    assert cost.list_collectives() == [Collective("all-reduce", 1, 64 * 128 * 2)]
    assert cost.hbm_bytes == 2 * 64 * 128 * 2  # as if it were not on other cores


def test_of_a_cpus_program_what_it_is_given_crosses_memory_and_loops_run_as_often_as_is_told():
    """Weights are read once, and the rows that a loop gathers from a table as often as it runs; the small sum stays in a cache."""

    def f(w, table, x, turns):
        with jax.named_scope("rows"):
            turn = lambda i, x: jnp.tanh(x + table[jnp.arange(64) * 7 + i].sum(0)) @ w
            return jax.lax.fori_loop(0, turns, turn, x @ w)

    shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    text = jax.jit(f).lower(shape(256, 256), shape(1 << 14, 256), shape(8, 256), shape(dtype=jnp.int32)).compile().as_text()
    once, ten = (Program(text, "cpu", {"rows": times}).cost() for times in (1, 10))
    rows, weights, products = 64 * 256 * 4, 256 * 256 * 4, 2 * 8 * 256 * 256
    assert ten.product_flops == 11 * products and once.product_flops == 2 * products
    assert ten.hbm_bytes - once.hbm_bytes == pytest.approx(9 * rows, rel=0.05)
    assert weights <= once.hbm_bytes - rows <= 1.1 * weights
    assert Program(text, "cpu").cost().product_flops == 2 * products  # a loop of which nothing is known counts once


@pytest.mark.parametrize(
    "decode,tokens,length,window",
    [(True, 11, 300, None), (True, 3, 127, None), (True, 3, 300, 40), (False, 200, 200, 40), (False, 160, 80, None)],
)
def test_how_often_attentions_loops_run(decode, tokens, length, window, monkeypatch):
    turns = []

    def loop(start, stop, body, carry):
        for i in range(int(start), int(stop)):
            turns.append(body.__name__)
            carry = body(i, carry)
        return carry

    def flash(q, positions, kv_pages, table, kv_lens, start, stop, *rest):
        turns.extend(["step"] * int(stop - start))
        return q

    monkeypatch.setattr(xla.jax.lax, "fori_loop", loop)
    monkeypatch.setattr(xla, "_flash", flash)
    monkeypatch.setattr(xla, "write_kv", lambda k, v, kv_pages, *rest: kv_pages)
    sequences, page = (tokens, 16) if decode else (tokens // length, 16)
    pages = -(-length // page)
    q, table = jnp.zeros((tokens, 1, 1)), jnp.zeros((sequences, pages), jnp.int32)
    xla.ragged_paged_attention_xla(
        q, q, q, jnp.zeros((1, 2, 1, page, 1)), table, jnp.full(sequences, length, jnp.int32),
        jnp.arange(sequences + 1, dtype=jnp.int32) * (1 if decode else length),
        jnp.asarray([tokens if decode else 0, sequences], jnp.int32),
        scale=1.0, window=window, softcap=None, sinks=None, decode_only=decode,
    )  # fmt: skip
    trips = xla.loop_trips(tokens, length, page, decode=decode, window=window)
    assert turns.count("decode") == trips["decode_blocks"]
    assert turns.count("prefill") == trips["prompts"]
    blocks = trips["decode_blocks"] if decode else trips["prompts"] * trips["query_blocks"]
    assert turns.count("one_block") == (0 if decode else blocks)
    assert turns.count("step") == pytest.approx(blocks * trips["key_chunks"])
