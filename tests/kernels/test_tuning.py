"""Block sizes: the heuristic's, those of a table, and how a table is found by measuring (in the kernels' interpreters, by a real clock)."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ragged_paged_attention import make_batch

from pallas_kernels.ragged_paged_attention import Table, file_name, measure, ragged_paged_attention, read_table, write_table
from pallas_kernels.ragged_paged_attention.measure import Load, candidates, tune
from pallas_kernels.ragged_paged_attention.tables import Entry
from pallas_kernels.ragged_paged_attention.tuning import (
    GpuBlocks,
    TpuBlocks,
    Work,
    decode_splits,
    fewer_rows,
    gpu_blocks,
    tpu_blocks,
    why_illegal,
)

DECODE = Work("decode", 8, 2, 128, 64, "bfloat16", "bfloat16")
CHUNKS = DECODE._replace(kernel="chunks")
LOAD = Load()


def table(*entries, kind="a chip"):
    return Table(kind, tuple(Entry(work, blocks, 1.0, 2.0) for work, blocks in entries))


# What this repository's programs had before there were tables: the heuristic is to stay as it is.
@pytest.mark.parametrize(
    "work,on_tpu,on_gpu",
    [
        (DECODE, (8, 1), (16, 64, 4, 3, 512)),
        (CHUNKS, (8, 128), (128, 64, 8, 2, 0)),
        (CHUNKS._replace(heads=71, kv_heads=1), (8, 48), (128, 64, 8, 2, 0)),
        (DECODE._replace(heads=71, kv_heads=1, width=256), (8, 1), (128, 32, 4, 2, 512)),
        (CHUNKS._replace(dtype="float32", kv_dtype="float32", width=256, page_size=256), (2, 128), (32, 16, 8, 2, 0)),
        (DECODE._replace(kv_heads=8, page_size=16, width=256), (16, 1), (16, 32, 4, 2, 512)),
    ],
)
def test_the_heuristic(work, on_tpu, on_gpu):
    assert tpu_blocks(work) == on_tpu and gpu_blocks(work) == on_gpu
    assert why_illegal(work, tpu_blocks(work)) is None and why_illegal(work, gpu_blocks(work)) is None


def test_rows_are_no_more_than_there_are_heads_of_tokens():
    assert fewer_rows(gpu_blocks(CHUNKS), CHUNKS, 4096) == (128, 64, 8, 2, 0)
    assert fewer_rows(gpu_blocks(CHUNKS), CHUNKS, 8) == (32, 64, 4, 2, 0)  # 4 heads to a key
    assert fewer_rows(gpu_blocks(CHUNKS), CHUNKS, 1).rows == 16
    assert fewer_rows(GpuBlocks(64, 64, 2, 1), CHUNKS, 1).warps == 2


def test_a_table_comes_before_the_heuristic():
    tuned = table((DECODE, TpuBlocks(4, 1)))
    assert tpu_blocks(DECODE, tuned) == (4, 1)
    assert tpu_blocks(CHUNKS, tuned) == tpu_blocks(CHUNKS)
    with pytest.raises(ValueError, match="for a chip has TpuBlocks, and GpuBlocks are needed"):
        gpu_blocks(DECODE, tuned)


@pytest.mark.parametrize(
    "work,blocks,reason",
    [
        (CHUNKS, TpuBlocks(8, 24), "multiple of 16"),
        (CHUNKS, TpuBlocks(8, 0), "multiple of 16"),
        (DECODE, TpuBlocks(8, 16), "decode has 1"),
        (DECODE, TpuBlocks(0, 1), "at least one page"),
        (DECODE, TpuBlocks(4.0, 1), "whole numbers"),
        (DECODE, TpuBlocks(512, 1), "64 MiB of vector memory, and there are 32"),
        (CHUNKS, GpuBlocks(48, 64, 4, 2), "a power of two"),
        (CHUNKS, GpuBlocks(8, 64, 4, 2), "at least 16"),
        (CHUNKS._replace(heads=64), GpuBlocks(16, 64, 4, 2), "at least 32 are needed for 32 heads to a key"),
        (DECODE, GpuBlocks(32, 64, 4, 2, 512), "decode has 16"),
        (DECODE, GpuBlocks(16, 8, 4, 2, 512), "at least 16"),
        (DECODE, GpuBlocks(16, 64, 3, 2, 512), "warps"),
        (DECODE, GpuBlocks(16, 64, 4, 0, 512), "stages"),
        (DECODE, GpuBlocks(16, 64, 4, 2, 32), "at least its 64 keys"),
        (CHUNKS, GpuBlocks(16, 64, 4, 2, 512), "chunks have none"),
        (CHUNKS, GpuBlocks(128, 128, 4, 3), "KiB of shared memory, and there are 99"),
    ],
)
def test_what_a_kernel_cannot_have(work, blocks, reason):
    assert reason in why_illegal(work, blocks)


@pytest.mark.parametrize("work", [DECODE, CHUNKS, CHUNKS._replace(heads=71, kv_heads=1, width=256)])
def test_candidates_are_legal_and_tell_apart(work):
    for blocks in (tpu_blocks(work), gpu_blocks(work)):
        found = [other for field in blocks._fields for other in candidates(work, blocks, field, LOAD)]
        assert len(found) >= 4 and len(set(found)) == len(found) and blocks not in found
        assert all(why_illegal(work, other) is None for other in found)
        assert all(sum(a != b for a, b in zip(other, blocks, strict=True)) == 1 for other in found)
    few = Load(sequences=2, keys=128, tokens=16)  # two pages: a block of more is the same
    assert candidates(DECODE, TpuBlocks(8, 1), "pages", few) == [TpuBlocks(1, 1)]
    assert candidates(CHUNKS, TpuBlocks(8, 128), "queries", few) == []
    assert candidates(DECODE, gpu_blocks(DECODE), "split", few) == []


# A file.


def test_a_table_is_read_as_it_was_written(tmp_path):
    written = table((DECODE, GpuBlocks(16, 32, 2, 3, 256)), (CHUNKS, GpuBlocks(64, 64, 4, 2)), kind="NVIDIA H200")
    path = tmp_path / "new" / file_name("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    write_table(written, path)
    assert read_table(path) == written and [p.name for p in path.parent.iterdir()] == [path.name]
    assert replace(written, entries=written.entries[::-1]).digest == written.digest
    other = written.with_entries([Entry(CHUNKS, GpuBlocks(32, 64, 4, 2), 1.0, 1.0)])
    assert len(other.entries) == 2 and other.find(CHUNKS).rows == 32 and other.digest != written.digest


def change_blocks(data):
    data["entries"][0]["blocks"]["keys"] = 48


@pytest.mark.parametrize(
    "change,message",
    [
        (change_blocks, "48 keys: a power of two"),
        (lambda data: data.update(format=2), "its format is 2"),
        (lambda data: data["entries"][0].pop("work"), "KeyError"),
        (lambda data: data["entries"][0]["blocks"].update(lanes=1), "lanes"),
        (lambda data: data["entries"][0]["work"].update(kv_heads=0), "no work of the kernels'"),
        (lambda data: data["entries"][0]["work"].update(page_size="64"), "no work of the kernels'"),
        (lambda data: data["entries"][0]["work"].update(kernel="prefill"), "no work of the kernels'"),
        (lambda data: data.update(platform="cpu"), "not a table"),
        (lambda data: data.update(entries=3), "not a table"),
    ],
)
def test_what_is_no_table(change, message, tmp_path):
    write_table(table((DECODE, GpuBlocks(16, 32, 2, 3, 256))), tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    change(data)
    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.json")


# What becomes of it.


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("kernel", ["decode", "chunks"])
def test_programs_have_the_sizes_of_the_table(platform, kernel):
    """And those of another kernel's work do not change. (As lowered for a TPU: tests/serving/test_block_sizes.py.)"""
    batch = make_batch((2, [1, 1, 20], [5, 300, 0], 0), 16, 4, 2, 128)
    work = Work(kernel, 4, 2, 128, 16, "float32", "float32")
    other = TpuBlocks(4, 1 if kernel == "decode" else 16) if platform == "tpu" else GpuBlocks(16, 16, 2, 1, 64 if kernel == "decode" else 0)

    def text(tuned, **options):
        op = jax.jit(partial(ragged_paged_attention, scale=1.0, implementation=platform, tuned=tuned, **options))
        return str(op.trace(*map(jnp.asarray, batch)).jaxpr)

    with_table = table((work, other))
    assert text(with_table) == text(with_table) != text(None)
    same = kernel == "chunks"  # which a program without chunks does not have
    assert (text(with_table, decode_only=True) == text(None, decode_only=True)) is same


@pytest.fixture
def few_values(monkeypatch):
    """The interpreters compile for seconds."""
    monkeypatch.setattr(measure, "_GPU_FIELDS", {"keys": (16,), "rows": (16,), "warps": (), "stages": (1,), "split": ()})
    monkeypatch.setattr(measure, "_BLOCK_KEYS", (16, 32))
    monkeypatch.setattr(measure, "_QUERIES", (16, 32))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("kernel", ["decode", "chunks"])
def test_tuning(platform, kernel, tmp_path, few_values):
    """The quickest of what was measured is chosen, and is what the table then has."""
    work, load = Work(kernel, 2, 1, 128, 16, "float32", "float32"), Load(sequences=2, keys=64, tokens=32)
    times, refused = {}, []

    def told(blocks, seconds, said):
        refused.append(said) if seconds is None else times.__setitem__(blocks, seconds)

    entry = tune(platform, work, load, interpret=True, rounds=1, progress=told)
    heuristic = (tpu_blocks if platform == "tpu" else gpu_blocks)(work)
    assert refused == [] and len(times) >= 3 and heuristic in times
    assert entry.blocks in times and entry.seconds == times[entry.blocks] > 0 and entry.heuristic_seconds == times[heuristic]
    assert entry.seconds <= 1.04 * min(times.values())
    assert why_illegal(work, entry.blocks) is None
    write_table(Table("the interpreter", (entry,)), tmp_path / "table.json")
    assert read_table(tmp_path / "table.json").find(work) == entry.blocks


def test_blocks_that_compute_something_else_are_not_chosen(monkeypatch, few_values):
    """As a compiler's mistake would."""
    from pallas_kernels.ragged_paged_attention import gpu

    work, load, right = Work("decode", 2, 1, 128, 16, "float32", "float32"), Load(sequences=2, keys=32, tokens=32), gpu._decode

    def wrong(q, kv_pages, *args, tuned, **options):
        out = right(q, kv_pages, *args, tuned=tuned, **options)
        return out if tuned.find(work) == gpu_blocks(work) else out + 1

    monkeypatch.setattr(gpu, "_decode", wrong)
    said = []
    entry = tune("gpu", work, load, interpret=True, rounds=1, progress=lambda blocks, seconds, why: said.append((seconds, why)))
    assert entry.blocks == gpu_blocks(work) and entry.seconds == entry.heuristic_seconds
    assert len(said) >= 3 and all(seconds is None and "results are up to 1 from" in why for seconds, why in said[1:])


def test_splits():
    assert decode_splits(4096, gpu_blocks(DECODE)) == (8, 512)
    assert decode_splits(4096, GpuBlocks(16, 64, 4, 2, 1000)) == (4, 1024)
    assert decode_splits(2**20, GpuBlocks(16, 64, 4, 2, 256)) == (32, 2**15)
    assert np.prod(decode_splits(100, GpuBlocks(16, 64, 4, 2, 256))) >= 100
