"""Adapters made by PEFT: the same logits here, and the same files when written again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import ADAPTERS, CASES, decoder, logits, logits_golden
from flax import nnx

from jaxllm.adapters import adapter_disabled, has_adapter, load_adapter, merge_adapter, read_adapter_config, save_adapter, unmerge_adapter
from jaxllm.checkpoints.safetensors_source import read_file
from jaxllm.errors import CheckpointError

# Scanned: each kind of adapter once, on all layers and on some; on other bases they are looked at unrolled.
_SCANNED = ["dora_layers", "dora_llama", "ia3_llama", "lora_gemma3", "lora_layers_patterns"]
_SCANNED += ["lora_save_modules", "prefix_llama", "prompt_llama"]


@pytest.mark.parametrize(
    "name, scan_layers",
    [pytest.param(name, False, id=f"{name}-unrolled") for name in CASES]
    + [pytest.param(name, True, id=f"{name}-scanned", marks=() if name in _SCANNED else pytest.mark.slow) for name in CASES],
)
def test_logits_and_files(name, scan_layers, tmp_path):
    base, tokens, expected = logits_golden(name)
    model = decoder(base, scan_layers)
    adapted, config = load_adapter(model, ADAPTERS / name)
    np.testing.assert_allclose(logits(adapted, tokens), expected, atol=1e-4, rtol=0)

    save_adapter(adapted, config, tmp_path / "again")
    theirs, ours = (read_file(folder / "adapter_model.safetensors") for folder in (ADAPTERS / name, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and tensor.shape == ours[key].shape and tensor.tobytes() == ours[key].tobytes(), key
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ADAPTERS / name, tmp_path / "again"))
    assert _comparable(ours) == _comparable(theirs)

    if adapted.virtual is None:
        merged = merge_adapter(adapted)
        assert nnx.split(merged, graph=False)[0] == nnx.split(model, graph=False)[0]  # a plain model: what is compiled for one fits
        np.testing.assert_allclose(logits(merged, tokens), expected, atol=1e-4, rtol=0)
        beside = merge_adapter(adapted, unload=False)
        for back in (unmerge_adapter(beside), adapter_disabled(unmerge_adapter(beside))):
            plain = adapted if has_adapter(back) else adapter_disabled(adapted)
            _assert_close(plain, back)
        np.testing.assert_array_equal(logits(adapter_disabled(adapted), tokens), logits(model, tokens))


def _assert_close(expected, actual):
    expected, actual = (nnx.split(m, graph=False) for m in (expected, actual))
    assert expected[0] == actual[0]
    for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(m[1]) for m in (expected, actual)), strict=True):
        np.testing.assert_allclose(ours[...], theirs[...], atol=3e-6, rtol=1e-5, err_msg=str(path))


def _comparable(values: dict) -> dict:
    """PEFT keeps names in sets, whose order is chance, and says what version it is. The names that "all-linear" (PEFT's file spells
    them out as ends) stands for are compared through the tensors' names."""
    values = {k: sorted(v) if isinstance(v, list) else v for k, v in values.items() if k != "peft_version"}
    values["target_modules"] = None
    return {k: None if v in ([], {}, False) else v for k, v in values.items()}


def test_what_does_not_fit_is_listed_at_once(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(ADAPTERS / "lora_llama", folder)
    from jaxllm.checkpoints.writer import write_file

    tensors = read_file(folder / "adapter_model.safetensors")
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    del tensors[q.format("A")]
    tensors[q.format("B")] = tensors[q.format("B")][:-1]
    tensors["base_model.model.vision.lora_A.weight"] = np.zeros((2, 2), np.float32)
    tensors[q.format("A").replace("layers.0", "layers.1")][0, 0] = np.nan
    write_file(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        load_adapter(decoder("llama_gqa", False), folder)
    for words in ("layers.0.self_attn.q_proj.lora_A.weight is missing", "has shape [31, 4]", "vision.lora_A", "layers.1", "NaN"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": 3}, "something_new"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"r": 0}, "rank_pattern"),
        ({"target_modules": ["nothing_proj"]}, "nothing_proj"),
        ({"target_modules": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(ADAPTERS / "lora_llama", folder)
    values = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=named):
        load_adapter(decoder("llama_gqa", False), folder)


def test_fields_left_at_none_or_false_and_notes_of_the_writer_are_accepted(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(ADAPTERS / "lora_llama", folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    few = {k: values[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}
    few |= {"auto_mapping": {"parent_library": "x"}, "new": None}
    (folder / "adapter_config.json").write_text(json.dumps(few))
    assert read_adapter_config(folder).r == 4


def test_another_base_is_warned_about(caplog):
    model = decoder("llama_gqa", False)
    load_adapter(model, ADAPTERS / "lora_llama", base_model="some/llama_gqa")
    assert not caplog.records
    load_adapter(model, ADAPTERS / "lora_llama", base_model="some/other")
    assert "llama_gqa" in caplog.text and "some/other" in caplog.text


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json is missing"):
        read_adapter_config(tmp_path)
    shutil.copy(ADAPTERS / "lora_llama" / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        load_adapter(decoder("llama_gqa", False), tmp_path)


def test_writing_never_replaces_what_is_no_adapter(tmp_path):
    model, config = load_adapter(decoder("llama_gqa", False), ADAPTERS / "lora_llama")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_adapter(model, config, tmp_path)
    with pytest.raises(CheckpointError, match="no adapter"):
        save_adapter(model, config, tmp_path, overwrite=True)
    save_adapter(model, config, tmp_path / "new", base_model="base", dtype=jnp.bfloat16)
    save_adapter(model, config, tmp_path / "new", overwrite=True, base_model="base")
    assert read_adapter_config(tmp_path / "new").base_model_name_or_path == "base"
    assert {t.dtype for t in read_file(tmp_path / "new" / "adapter_model.safetensors").values()} == {jax.dtypes.canonicalize_dtype("f4")}
