"""The benches' figures on a tiny model: that they are all there, add up, and say when something is wrong."""

import json

import pytest
from golden_cases import MODELS
from tiny_models import write_llama

from jaxllm.launch.__main__ import main

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FEW_SHAPES = ["--max-num-batched-tokens", "32", "--json"]  # they compile in seconds
TINY = ["--model", str(MODELS / "llama_gqa"), "--dtype", "float32", *FEW_SHAPES]


def run(capfd, *flags: str) -> dict:
    code = main(["bench", *flags])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)


def check_memory(result):
    assert result["weights_bytes"] > 100_000 and result["kv_cache_bytes"] > 0
    assert result["peak_rss_bytes"] > result["weights_bytes"] + result["kv_cache_bytes"]


def test_throughput(capfd):
    lengths = ["--num-prompts", "2", "--input-len", "15", "--output-len", "18", "--repeats", "1"]
    result = run(capfd, "throughput", *TINY, *lengths)
    check_memory(result)
    assert result["compiles_after_warmup"] == 0
    assert result["output_tokens_per_s"] * result["seconds"] == pytest.approx(2 * 18, rel=0.1)  # both are rounded
    # In each step a sequence has 15 to 32 tokens, in pages of 8.
    empty = [-n % 8 for n in range(15, 33)]
    assert result["kv_waste"] == pytest.approx(sum(empty) / (sum(range(15, 33)) + sum(empty)), abs=1e-3)


def test_mixed(capfd, tmp_path):
    model = ["--model", str(write_llama(tmp_path / "tiny", tokenizer=True)), *FEW_SHAPES]
    lengths = ["--num-requests", "30", "--max-input-len", "60", "--max-output-len", "20", "--max-num-seqs", "4"]
    result = run(capfd, "mixed", *model, *lengths, "--page-size", "4")
    check_memory(result)
    assert result["finished"] + result["aborted"] == 30 and result["finished"] > 20
    assert result["compiles_after_warmup"] == 0 and result["pages_leaked"] == 0
    assert 0 < result["kv_waste"] < 0.5 and result["features"]["temperature"] > 0


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_train(capfd, mode):
    sizes = ["--batch", "2", "--seq-len", "16", "--repeats", "1"]
    result = run(capfd, "train", "--model", str(MODELS / "llama_gqa"), "--mode", mode, *sizes, "--json")
    assert result["tokens_per_s"] * result["step_s"] == pytest.approx(32, rel=0.1) and result["first_step_s"] > result["step_s"]
    assert result["flops_per_s"] > 0 and result["peak_rss_bytes"] > 1e6


def test_prefix(capfd):
    lengths = ["--num-prompts", "4", "--prefix-len", "64", "--suffix-len", "3", "--output-len", "5", "--repeats", "2"]
    result = run(capfd, "prefix", *TINY, *lengths)
    check_memory(result)
    assert result["outputs_identical"] is True and result["compiles_after_warmup"] == 0
    assert result["cached_share"] == pytest.approx(3 * 64 / (4 * 67), abs=1e-3)  # the first computes it for the others
    assert result["cached_share_uncached"] == 0 and result["ttft_ms_uncached"] > 0


@pytest.mark.parametrize("bench, flag", [("mixed", "num-requests"), ("mixed", "requests-per-step"), ("prefix", "prefix-len")])
def test_wrong_flags(capfd, bench, flag):
    assert main(["bench", bench, "--model", "demo", f"--{flag}", "0", "--json"]) == 2
    assert flag.replace("-", "_") in capfd.readouterr().out
