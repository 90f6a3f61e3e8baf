"""Safetensors folders: written, read back (by us and by the safetensors package), sliced, and damaged in every way we could think of."""

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxllm.checkpoints import open_checkpoint, write_safetensors
from jaxllm.checkpoints.safetensors_source import DTYPES
from jaxllm.errors import CheckpointError

CONFIG = {"model_type": "llama", "hidden_size": 8}
TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(10).astype(ml_dtypes.bfloat16),
    "c": np.float16(3).reshape(()),
    "d": np.zeros((0, 3), np.int8),
}


@settings(max_examples=50, deadline=None)
@given(data=st.data(), limit=st.integers(1, 400))
def test_what_is_written_is_read_back(tmp_path_factory, data, limit):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shapes = data.draw(st.lists(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), min_size=0, max_size=6))
    tensors = {}
    for number, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from(list(DTYPES.values())))
        raw = data.draw(npst.arrays(np.uint8, (int(np.prod(shape)) * dtype.itemsize,), elements=st.integers(0, 1)))
        tensors[f"layer.{number}"] = raw.view(dtype).reshape(shape)
    write_safetensors(folder, tensors.items(), CONFIG, max_shard_bytes=limit)
    source = open_checkpoint(folder)
    assert source.config == CONFIG and source.path == folder
    assert {name: tuple(info) for name, info in source.tensors.items()} == {k: (v.shape, v.dtype.name) for k, v in tensors.items()}
    for name, tensor in tensors.items():
        assert source.read(name).tobytes() == tensor.tobytes()
        index = tuple(data.draw(st.slices(size)) for size in tensor.shape)[: data.draw(st.integers(0, 3))]
        part = source.read(name, index)
        assert part.shape == tensor[index].shape and part.tobytes() == tensor[index].tobytes()
    files = list(folder.glob("*.safetensors"))
    theirs = [dict(safetensors.deserialize(file.read_bytes())) for file in files]
    assert {name: bytes(part["data"]) for held in theirs for name, part in held.items()} == {k: v.tobytes() for k, v in tensors.items()}
    for held in theirs:  # a shard exceeds the limit only to hold one tensor
        sizes = [len(part["data"]) for part in held.values()]
        assert sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1


def test_shards_follow_hugging_faces_naming(tmp_path):
    write_safetensors(tmp_path / "m", TENSORS.items(), CONFIG, max_shard_bytes=100)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{1 + (name > 'a')}-of-00002.safetensors" for name in "abcd"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    with safetensors.safe_open(tmp_path / "m" / "model-00001-of-00002.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_strided_and_device_arrays_are_written_by_value(tmp_path):
    import jax.numpy as jnp

    strided = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    write_safetensors(tmp_path / "m", [("x", strided), ("y", jnp.arange(3.0, dtype=jnp.bfloat16))], CONFIG)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m").read("x"), strided)
    assert open_checkpoint(tmp_path / "m").read("y").tolist() == [0, 1, 2]


def test_writing_is_all_or_nothing(tmp_path):
    def failing():
        yield from TENSORS.items()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_safetensors(tmp_path / "m", failing(), CONFIG, max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []

    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    write_safetensors(tmp_path / "m", TENSORS.items(), CONFIG, copy_files=[extra])
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        write_safetensors(tmp_path / "m", TENSORS.items(), CONFIG)
    with pytest.raises(RuntimeError):
        write_safetensors(tmp_path / "m", failing(), CONFIG, overwrite=True)
    assert set(open_checkpoint(tmp_path / "m").tensors) == set(TENSORS)
    write_safetensors(tmp_path / "m", [("only", np.ones(2))], CONFIG, overwrite=True)
    assert set(open_checkpoint(tmp_path / "m").tensors) == {"only"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "tokenizer.json"]


def test_writing_refuses_what_it_cannot_mean(tmp_path):
    with pytest.raises(CheckpointError, match="'a' was given twice"):
        write_safetensors(tmp_path / "m", [("a", TENSORS["a"])] * 2, CONFIG)
    with pytest.raises(CheckpointError, match="'z' has dtype complex64"):
        write_safetensors(tmp_path / "m", [("z", np.ones(2, np.complex64))], CONFIG)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="no config.json"):
        write_safetensors(tmp_path / "home", TENSORS.items(), CONFIG, overwrite=True)
    with pytest.raises(CheckpointError, match="a file is there"):
        write_safetensors(tmp_path / "home" / "diary.txt", TENSORS.items(), CONFIG)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["home"]


def edit_index(change):
    def damage(folder: Path):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return damage


def edit_shard(change, shard="model-00001-of-00002.safetensors"):
    return lambda folder: (folder / shard).write_bytes(change((folder / shard).read_bytes()))


def header_of(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def empty(folder: Path):
    for file in folder.iterdir():
        file.unlink()


def only(*names: str):
    return both(empty, lambda folder: [(folder / name).write_bytes(b"x") for name in names])


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
    "bad config": (lambda folder: (folder / "config.json").write_text("{'a': 1}"), ["config.json is not valid JSON"]),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json holds a JSON list"]),
    "config that is a folder": (
        both(lambda folder: (folder / "config.json").unlink(), lambda folder: (folder / "config.json").mkdir()),
        ["config.json cannot be read"],
    ),
    "all shards and config gone": (
        lambda folder: [file.unlink() for file in folder.iterdir() if "index" not in file.name],
        ["2 of 2 shards", "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors", "config.json is missing"],
    ),
    "shard outside the folder": (edit_index(lambda files: files.update(a="../a.safetensors")), ["missing: ../a.safetensors"]),
    "tensor not in its shard": (edit_index(lambda files: files.update(ghost=files["a"])), ["ghost (model-00001-of-00002.safetensors)"]),
    "tensor in another shard": (edit_index(lambda files: files.update(a=files["b"])), ["a (model-00002-of-00002.safetensors)"]),
    "tensor not in the index": (edit_index(lambda files: files.pop("c")), ["1 tensors are in a shard but not in", ": c"]),
    "index without map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), ["no valid weight_map"]),
    "bad index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), ["index.json is not valid JSON"]),
    "index gone": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        ["neither model.safetensors nor model.safetensors.index.json", "model-00002-of-00002.safetensors"],
    ),
    "single file beside the index": (lambda folder: (folder / "model.safetensors").touch(), ["holds both"]),
    "both shards cut": (
        both(edit_shard(lambda raw: raw[:40]), edit_shard(lambda raw: raw[:-1], "model-00002-of-00002.safetensors")),
        ["00001-of-00002.safetensors is truncated", "00002-of-00002.safetensors is truncated: its tensors need"],
    ),
    "shard of 3 bytes": (edit_shard(lambda raw: raw[:3]), ["is truncated: 3 bytes"]),
    "not safetensors": (edit_shard(lambda raw: header_of("no JSON")), ["damaged header"]),
    "header of a wrong kind": (edit_shard(lambda raw: header_of("[1]")), ["damaged header"]),
    "entry without offsets": (edit_shard(lambda raw: header_of('{"a":{"dtype":"F32","shape":[1]}}')), ["damaged header", "data_offsets"]),
    "offsets that do not fit": (
        edit_shard(lambda raw: header_of('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + b"...."),
        ["'a'"],
    ),
    "negative shape": (edit_shard(lambda raw: header_of('{"a":{"dtype":"I8","shape":[-1,-4],"data_offsets":[0,4]}}') + b"...."), ["'a'"]),
    "unknown dtype": (edit_shard(lambda raw: header_of("{" + ENTRY.replace("F32", "F4") + "}") + b"...."), ["'a' of type F4"]),
    "name twice in a header": (edit_shard(lambda raw: header_of("{" + f"{ENTRY},{ENTRY}" + "}") + b"...."), ["duplicate names a"]),
    "tensor in two shards": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(
            (folder / "model-00001-of-00002.safetensors").read_bytes()
        ),
        ["model-00002-of-00002.safetensors repeats tensors: a (also in model-00001-of-00002.safetensors)"],
    ),
    "empty folder": (empty, ["is empty"]),
    "pickles only": (only("config.json", "pytorch_model.bin", "other.pt"), ["other.pt, pytorch_model.bin", "safetensors"]),
    "no weights": (only("config.json", "README.md"), ["holds no weights", "README.md"]),
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), ["adapter"]),
    "two GGUF files": (only("a.gguf", "b.gguf"), ["2 GGUF files (a.gguf, b.gguf)"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_with_every_culprit(tmp_path, case):
    folder = write_safetensors(tmp_path / "m", TENSORS.items(), CONFIG, max_shard_bytes=100)
    damage, messages = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    for message in messages:
        assert message in str(error.value)


def test_paths_that_are_no_checkpoint(tmp_path, make_gguf):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="neither a folder nor a .gguf file"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    make_gguf("llama")
    assert open_checkpoint(tmp_path).config["model_type"] == "llama"  # the one GGUF file of a folder
    with pytest.raises(CheckpointError, match="no tensor 'ghost'"):
        open_checkpoint(tmp_path).read("ghost")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = write_safetensors(tmp_path / "m", TENSORS.items(), CONFIG)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()  # root may read any file, but nobody a folder as one
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        open_checkpoint(folder)


def test_reading_holds_one_tensor_at_a_time(tmp_path):
    size = 8 << 20
    big = np.ones((1024, size // 4096), np.float32)
    write_safetensors(tmp_path / "m", ((f"w{i}", big) for i in range(25)), CONFIG)  # 200 MiB
    tracemalloc.start()
    try:
        source = open_checkpoint(tmp_path / "m")
        total = sum(source.read(name).nbytes for name in source.tensors)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        source.read("w3", (slice(0, 8), slice(0, 16)))
        sliced = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert total == 25 * size and peak < 1.1 * size
    assert sliced < 64 << 10


def test_writing_holds_one_shard_at_a_time(tmp_path):
    size = 4 << 20
    tracemalloc.start()
    try:
        tensors = ((f"w{i}", np.ones(size // 4, np.float32)) for i in range(20))
        write_safetensors(tmp_path / "m", tensors, CONFIG, max_shard_bytes=2 * size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A full shard, and the tensor that no longer fits into it.
    assert peak < 3.2 * size
    assert len(open_checkpoint(tmp_path / "m").tensors) == 20
