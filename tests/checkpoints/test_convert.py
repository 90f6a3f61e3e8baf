"""Conversion to a Hugging Face folder: the same model comes out, or nothing does."""

import json
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from golden_cases import CASES, MODELS, generated, golden

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints import convert, open_checkpoint, write_safetensors
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.gguf_file import open_gguf

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS = dict(dtype="float32", max_num_seqs=2, max_num_batched_tokens=16, max_model_len=80, skip_tokenizer_init=True, warmup=False)


def greedy(model: Path) -> list[int]:
    return LLM(model, **OPTIONS).generate({"prompt_token_ids": [5, 3, 40, 7, 11]}, GREEDY)[0].outputs[0].token_ids


def read_all(path: Path) -> dict[str, np.ndarray]:
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source.tensors}


def quantised(path: Path, out: Path) -> Path:
    """The same GGUF file with its matrices in Q8_0."""
    file = open_gguf(path)
    writer = gguf.GGUFWriter(out, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if key != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, tensor in file.tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(tensor.shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(file.read(name), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_gguf_file_becomes_the_same_model(make_gguf, tmp_path, architecture):
    path, _ = make_gguf(architecture, {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
    report = convert(path, tmp_path / "out")
    before, after = read_all(path), read_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert greedy(path) == greedy(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**open_checkpoint(path).config, "torch_dtype": "float32"} and len(config["architectures"]) == 1
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert report["tensors"] == len(before) and report["dtype"] == "float32" and report["model_type"] == architecture
    assert report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["files"] == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_quantised_gguf_file_becomes_bfloat16_unless_told_otherwise(make_gguf, tmp_path):
    path = quantised(make_gguf("llama")[0], tmp_path / "q8.gguf")
    assert convert(path, tmp_path / "a")["dtype"] == "bfloat16"
    assert convert(path, tmp_path / "b", dtype="float32")["dtype"] == "float32"
    exact, rounded, stored = (read_all(p) for p in (tmp_path / "b", tmp_path / "a", path))
    for name, values in stored.items():
        assert np.array_equal(exact[name], values)
        assert rounded[name].dtype == ml_dtypes.bfloat16 and np.array_equal(rounded[name], values.astype(ml_dtypes.bfloat16))
    assert greedy(path) == greedy(tmp_path / "b")


@pytest.mark.parametrize("case", CASES)
def test_every_family_converts_to_itself(case, tmp_path):
    report = convert(MODELS / case, tmp_path / "out")
    before, after = read_all(MODELS / case), read_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((MODELS / case / "config.json").read_text())
    assert (tmp_path / "out/generation_config.json").read_bytes() == (MODELS / case / "generation_config.json").read_bytes()
    assert report["dtype"] == ("bfloat16" if case == "llama_bf16" else "float32")


def test_shards_are_joined_and_the_tokens_stay(tmp_path):
    convert(MODELS / "llama_gqa", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    llm = LLM(tmp_path / "out", **OPTIONS)
    outputs = llm.generate([{"prompt_token_ids": g["prompt"].tolist()} for g in golden("llama_gqa")], GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [tokens[:12] for tokens in generated("llama_gqa")]


def test_bfloat16_halves_the_size_and_says_so(tmp_path):
    whole = convert(MODELS / "llama_gqa", tmp_path / "whole")
    half = convert(MODELS / "llama_gqa", tmp_path / "half", dtype="bfloat16")
    tensors = sum(x.nbytes for x in read_all(tmp_path / "whole").values())
    assert whole["bytes"] - half["bytes"] == tensors // 2  # the headers are as long
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert {x.dtype.name for x in read_all(tmp_path / "half").values()} == {"bfloat16"}


def test_nested_configurations_say_it_too(tmp_path):
    config = open_checkpoint(MODELS / "gemma3_conditional").config
    config = {**config, "text_config": {**config["text_config"], "torch_dtype": "float32"}}
    write_safetensors(tmp_path / "in", read_all(MODELS / "gemma3_conditional").items(), config)
    convert(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


def test_integers_stay_and_an_unnamed_architecture_is_named(tmp_path):
    config = {k: v for k, v in open_checkpoint(MODELS / "llama_mha_tied").config.items() if k not in ("architectures", "dtype")}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4)}  # ignored when loading
    write_safetensors(tmp_path / "in", (read_all(MODELS / "llama_mha_tied") | old).items(), config)
    convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    types = {name: x.dtype.name for name, x in read_all(tmp_path / "out").items()}
    assert types.pop("model.layers.0.self_attn.rotary_emb.inv_freq") == "int64" and set(types.values()) == {"float16"}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {**config, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}


def test_tokenizer_files_are_copied_as_they_are(tmp_path):
    shutil.copytree(MODELS / "qwen2", tmp_path / "in")
    files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"odd": 1}', "additional_chat_templates/tool_use.jinja": "{{ tools }}"}
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "in" / "pytorch_model.bin").write_text("not wanted")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert "additional_chat_templates" in report["files"] and "pytorch_model.bin" not in report["files"]


def test_a_folder_is_overwritten_only_when_asked(tmp_path):
    convert(MODELS / "qwen2", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out is not empty.*overwrite=True"):
        convert(MODELS / "llama_gqa", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config["model_type"] == "qwen2"
    convert(MODELS / "llama_gqa", tmp_path / "out", overwrite=True)
    assert open_checkpoint(tmp_path / "out").config["model_type"] == "llama"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no checkpoint and is not overwritten"):
        convert(MODELS / "llama_gqa", tmp_path / "other", overwrite=True)


def broken(tmp_path: Path, change) -> Path:
    tensors, config = read_all(MODELS / "llama_gqa"), open_checkpoint(MODELS / "llama_gqa").config
    change(tensors, config)
    return write_safetensors(tmp_path / "in", tensors.items(), config)


NAME = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "missing": (lambda t, c: t.pop(NAME), None, f"{NAME} is missing"),
    "extra": (lambda t, c: t.update(spare=t[NAME]), None, "spare matches nothing"),
    "shape": (lambda t, c: t.update({NAME: t[NAME].T}), None, rf"{NAME} has shape \[32, 48\]"),
    "family": (lambda t, c: c.update(model_type="llama5"), None, "'llama5' is not implemented; the nearest is 'llama'"),
    "integers": (lambda t, c: t.update({NAME: t[NAME].astype(np.int8)}), None, f"{NAME} is of type int8"),
    "nan": (lambda t, c: t[NAME].__setitem__((3, 4), np.nan), None, f"NaN or infinity in {NAME}"),
    "infinity": (lambda t, c: t[NAME].__setitem__((3, 4), -np.inf), "bfloat16", f"NaN or infinity in {NAME}"),
    "overflow": (lambda t, c: t[NAME].__setitem__((3, 4), 1e5), "float16", rf"infinity in {NAME} \(as float16\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_leaves_nothing_behind(case, tmp_path):
    change, dtype, message = BROKEN[case]
    source = broken(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", dtype=dtype)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16, float16 or None, not 'int4'"):
        convert(MODELS / "qwen2", tmp_path / "out", dtype="int4")


def test_64_bit_weights_load_and_convert(tmp_path):
    source = broken(tmp_path, lambda t, c: t.update({name: x.astype(np.float64) for name, x in t.items()}))
    assert greedy(source) == greedy(MODELS / "llama_gqa")
    convert(source, tmp_path / "out", dtype="float32")
    assert all(np.array_equal(x, read_all(MODELS / "llama_gqa")[name]) for name, x in read_all(tmp_path / "out").items())
