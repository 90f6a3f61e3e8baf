"""`jaxllm tune-kernels`: measured in the kernels' interpreters, where there is no chip."""

import json

import pytest

from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.launch.plan import read_model_config
from jaxllm.launch.tune_kernels import Config, tune_model, work_of
from jaxllm.models import config_from_hf
from jaxllm.serving.block_sizes import find_table
from pallas_kernels.ragged_paged_attention import measure
from pallas_kernels.ragged_paged_attention.tuning import TpuBlocks

LLAMA = "configs/models/llama-3-8b.yaml"
TINY = config_from_hf(
    dict(model_type="llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
         head_dim=16, vocab_size=32, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu")
)  # fmt: skip
SMALL = dict(model=LLAMA, page_size=16, dtype="float32", max_num_seqs=2, max_model_len=32, max_num_batched_tokens=32)


def test_without_a_chip_there_is_nothing_to_measure(capsys):
    assert main(["tune-kernels", "--model", LLAMA]) == 2
    assert "tune-kernels measures on a TPU or GPU, and there is none here: JAX's default device is cpu" in capsys.readouterr().err


def test_wrong_flags(capsys):
    assert main(["tune-kernels", "--model", LLAMA, "--page-size", "0"]) == 2
    assert "page_size must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tensor,platform,heads,kv_heads,width",
    [(1, "gpu", 32, 8, 128), (4, "tpu", 8, 2, 128), (16, "tpu", 2, 1, 128)],  # 16 devices share 8 heads of keys
)
def test_what_a_device_has_to_do(tensor, platform, heads, kv_heads, width):
    config = Config(model=LLAMA, dtype="bfloat16", tensor_parallel_size=tensor, kv_cache_dtype="fp8")
    works = work_of(config, read_model_config(LLAMA), platform)
    assert [w.kernel for w in works] == ["decode", "chunks"]
    for work in works:
        assert work[1:] == (heads, kv_heads, width, 64, "bfloat16", "float8_e4m3fn")
    assert {w.width for w in work_of(Config(model=LLAMA, dtype="bfloat16"), TINY, "tpu")} == {128}


def test_a_table_is_made_and_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "_BLOCK_KEYS", (16,))  # each compiles for seconds
    monkeypatch.setattr(measure, "_QUERIES", (16,))
    result = tune_model(Config(**SMALL), TINY, "tpu", "cpu", interpret=True)
    path = tmp_path / "kernels" / "cpu.json"
    assert result["path"] == str(path) and json.loads(path.read_text())["platform"] == "tpu"
    assert "the heuristic's" in capsys.readouterr().err
    found = find_table("cpu")
    for work, entry in zip(work_of(Config(**SMALL), TINY, "tpu"), result["entries"], strict=True):
        assert found.find(work) == TpuBlocks(**entry["blocks"]) and 0 < entry["seconds"] <= entry["heuristic_seconds"]

    with pytest.raises(ConfigError, match="has block sizes for 'cpu', and the device here is 'NVIDIA H200'"):
        tune_model(Config(**SMALL, out=str(path)), TINY, "tpu", "NVIDIA H200", interpret=True)


def test_what_the_kernels_cannot_do_is_said(tmp_path):
    with pytest.raises(ConfigError, match="page_size 12 is not a multiple of 8"):
        tune_model(Config(**SMALL | {"page_size": 12}, out=str(tmp_path / "t.json")), TINY, "tpu", "TPU v6 lite", interpret=True)
    assert not (tmp_path / "t.json").exists()
