"""The GGUF reader: dequantisation against the gguf package, metadata, damaged files."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from jaxllm.errors import CheckpointError
from jaxllm.gguf_file import TENSOR_TYPES, open_gguf

QUANTISED = [name for name, block, _ in TENSOR_TYPES.values() if block > 1]


def write(path, tensors=(), metadata=(), **options):
    """A GGUF file with `tensors` (name, array, raw type or None) and `metadata` (method of GGUFWriter, arguments)."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for method, *arguments in metadata:
        getattr(writer, method)(*arguments)
    for name, array, raw_type in tensors:
        writer.add_tensor(name, array, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_block_layouts_are_ggmls():
    for number, (name, *layout) in TENSOR_TYPES.items():
        assert Type(number).name == name
        assert gguf.GGML_QUANT_SIZES[Type(number)] == tuple(layout)


@pytest.mark.parametrize("name", QUANTISED)
def test_dequantisation_is_ggmls(tmp_path, name):
    rng = np.random.default_rng(1)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[Type[name]]
    if name.endswith("_K"):  # gguf cannot quantise to these: any bytes will do, if the float16 scales in them are finite
        blocks = rng.integers(0, 60, size=(6, 2 * block_bytes), dtype=np.uint8)
    else:
        blocks = quants.quantize(rng.normal(size=(6, 2 * block_values)).astype(np.float32), Type[name])
    path = write(tmp_path / "a.gguf", [("w", blocks.reshape(2, 3, -1), Type[name]), ("v", blocks[:1].reshape(-1), Type[name])])
    file, expected = open_gguf(path), quants.dequantize(blocks, Type[name]).reshape(2, 3, -1)
    assert np.isfinite(expected).all() and expected.any()
    assert (file.tensors["w"].shape, file.tensors["w"].type, file.read("w").dtype) == ((2, 3, 2 * block_values), name, np.float32)
    np.testing.assert_array_equal(file.read("w"), expected)
    np.testing.assert_array_equal(file.read("w", slice(1, 2)), expected[1:2])
    np.testing.assert_array_equal(file.read("w", slice(1, 1)), expected[1:1])
    np.testing.assert_array_equal(file.read("v", slice(3, 40)), expected[0, 0, 3:40])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_types_keep_their_dtype(tmp_path, dtype):
    values = np.random.default_rng(2).normal(size=(3, 5)).astype(dtype)
    raw = (values.view(np.uint8), Type.BF16) if dtype == ml_dtypes.bfloat16 else (values, None)
    file = open_gguf(write(tmp_path / "a.gguf", [("w", *raw), ("v", raw[0][0], raw[1])]))
    assert file.read("w").dtype == file.tensors["w"].dtype == dtype
    np.testing.assert_array_equal(file.read("w"), values)
    np.testing.assert_array_equal(file.read("w", np.array([2, 0])), values[[2, 0]])
    np.testing.assert_array_equal(file.read("v", slice(1, 3)), values[0, 1:3])


def test_metadata_is_plain_python(tmp_path):
    entries = [
        ("add_bool", "b", True),
        ("add_int8", "i", -3),
        ("add_uint64", "u", 2**60),
        ("add_float64", "f", 0.1),
        ("add_string", "s", "é"),
    ]
    entries += [("add_array", "words", ["a", "", "é"]), ("add_array", "numbers", [1, 2, 3]), ("add_array", "scores", [0.5, 1.5])]
    metadata = open_gguf(write(tmp_path / "a.gguf", metadata=entries)).metadata
    assert [metadata[key] for key in ("b", "i", "u", "f", "s", "words")] == [True, -3, 2**60, 0.1, "é", ["a", "", "é"]]
    assert metadata["b"] is True and metadata["numbers"].tolist() == [1, 2, 3] and metadata["scores"].tolist() == [0.5, 1.5]
    with pytest.raises(TypeError):
        metadata["b"] = False


def test_opening_twice_is_free_until_the_file_changes(tmp_path):
    path = write(tmp_path / "a.gguf", [("w", np.ones(4, np.float32), None)])
    first = open_gguf(path)
    assert open_gguf(str(path)) is first
    write(path, [("other", np.ones(8, np.float32), None)])
    assert list(open_gguf(path).tensors) == ["other"]


def patched(offset: int, new: bytes):
    return lambda raw: raw[:offset] + new + raw[offset + len(new) :]


BROKEN = {
    "empty": (lambda raw: b"", "only 0 bytes"),
    "other magic": (patched(0, b"GGML"), "b'GGML'"),
    "version 1": (patched(4, struct.pack("<I", 1)), "version 1"),
    "big-endian": (patched(4, struct.pack(">I", 3)), "big-endian"),
    "cut in the header": (lambda raw: raw[:60], "truncated"),
    "cut in the tensors": (lambda raw: raw[:-8], "tensor 'second' ends at byte"),
    "absurd count": (patched(16, struct.pack("<Q", 2**60)), "truncated|unknown type"),
    "absurd string": (patched(24, struct.pack("<Q", 2**62)), "truncated"),
    "unknown type": (lambda raw: raw.replace(b"second" + struct.pack("<IQI", 1, 64, 0), b"second" + struct.pack("<IQI", 1, 64, 77)), "77"),
    "type not implemented": (
        lambda raw: raw.replace(b"second" + struct.pack("<IQI", 1, 64, 0), b"second" + struct.pack("<IQI", 1, 64, int(Type.IQ4_XS))),
        "'second' has type IQ4_XS.*convert it to one of F32",
    ),
    "row not of whole blocks": (
        lambda raw: raw.replace(b"second" + struct.pack("<IQI", 1, 64, 0), b"second" + struct.pack("<IQI", 1, 65, 2)),
        "rows of 65 values",
    ),
    "no dimensions": (lambda raw: raw.replace(b"second" + struct.pack("<I", 1), b"second" + struct.pack("<I", 0)), "rank 0"),
    "twice": (lambda raw: raw.replace(b"second", b"first_"), "'first_' appears twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused_by_name(tmp_path, case):
    damage, message = BROKEN[case]
    path = write(tmp_path / "a.gguf", [("first_", np.ones(64, np.float32), None), ("second", np.ones(64, np.float32), None)])
    raw = path.read_bytes()
    damaged = damage(raw)
    assert damaged != raw
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_missing_big_endian_and_split_files(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_gguf(write(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG))
    with pytest.raises(CheckpointError, match="one of 3 parts.*--merge"):
        open_gguf(write(tmp_path / "split.gguf", metadata=[("add_uint16", "split.count", 3)]))
    with pytest.raises(CheckpointError, match="no tensor 'w'"):
        open_gguf(write(tmp_path / "a.gguf")).read("w")
