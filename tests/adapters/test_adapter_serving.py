"""An adapter merged at load: the engine generates what PEFT's logits say."""

import json

import numpy as np
import pytest
from adapter_cases import ADAPTERS, decoder, logits, logits_golden, randomised
from flax import nnx
from golden_cases import MODELS
from tiny_models import write_llama

from jaxllm import LLM, SamplingParams
from jaxllm.adapters import LoraConfig, add_adapter, save_adapter
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.sharding import ShardingRules, make_mesh

OPTIONS = dict(skip_tokenizer_init=True, warmup=False, max_num_seqs=4, max_model_len=64, num_pages=64)


@pytest.mark.parametrize(
    "name, options",
    [
        ("lora_llama", {}),
        ("dora_phi3", {"scan_layers": True}),
        ("lora_llama", {"tensor_parallel_size": 2}),
        ("lora_save_modules", {"tensor_parallel_size": 2, "scan_layers": True}),
    ],
)
def test_greedy_tokens_are_those_of_pefts_logits(name, options):
    base, tokens, expected = logits_golden(name)
    llm = LLM(MODELS / base, adapter=ADAPTERS / name, **OPTIONS, **options)
    prefixes = [{"prompt_token_ids": tokens[:n].tolist()} for n in (3, 8, 13, len(tokens))]
    outputs = llm.generate(prefixes, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    plain = LLM(MODELS / base, **OPTIONS, **options).generate(prefixes, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    got = [output.outputs[0].token_ids[0] for output in outputs]
    assert got == [int(np.argmax(expected[len(p["prompt_token_ids"]) - 1])) for p in prefixes]
    assert got != [output.outputs[0].token_ids[0] for output in plain]


def test_generate_takes_an_adapter(tmp_path, capfd):
    folder = write_llama(tmp_path / "model", tokenizer=True)
    made = load_model(open_checkpoint(folder), dtype=np.float32, mesh=make_mesh(), rules=ShardingRules())
    config = LoraConfig(r=4, target_modules="all-linear", lora_alpha=32)
    adapted = randomised(add_adapter(nnx.merge(made.graph, made.params), config, rngs=nnx.Rngs(0)), 0.5)
    save_adapter(adapted, config, tmp_path / "adapter", base_model=str(folder))
    texts = []
    for more in ([], ["--adapter", str(tmp_path / "adapter")]):
        argv = ["generate", "--model", str(folder), "--prompt", "hello there", "--max-tokens", "8", "--max-model-len", "64", "--json"]
        assert main([*argv, *more]) in (0, None)
        texts.append(json.loads(capfd.readouterr().out.splitlines()[-1])["token_ids"])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", ["lora_llama", "dora_phi3", "ia3_gpt2", "lora_save_modules"])
def test_what_is_merged_and_written_has_pefts_logits(name, tmp_path, capfd):
    base, tokens, expected = logits_golden(name)
    argv = ["convert", "--model", str(MODELS / base), "--adapter", str(ADAPTERS / name), "--out", str(tmp_path / "merged")]
    assert main([*argv, "--dtype", "float32", "--json"]) in (0, None)
    assert "model.safetensors" in json.loads(capfd.readouterr().out.splitlines()[-1])["files"]
    np.testing.assert_allclose(logits(decoder(tmp_path / "merged", False), tokens), expected, atol=1e-4)


def test_what_cannot_be_merged_leaves_nothing(tmp_path, capfd):
    for base, adapter, why in (
        ("llama_mqa_bias", ADAPTERS / "lora_llama", "does not fit the model"),
        ("llama_gqa", ADAPTERS / "prefix_llama", "PREFIX_TUNING"),
        ("llama_gqa", tmp_path, "adapter_config.json is missing"),
    ):
        assert main(["convert", "--model", str(MODELS / base), "--adapter", str(adapter), "--out", str(tmp_path / "merged")])
        assert why in capfd.readouterr().err and not (tmp_path / "merged").exists()


def test_what_cannot_be_served_is_refused_before_the_weights_are_read(tmp_path):
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        LLM(MODELS / "llama_gqa", adapter=ADAPTERS / "prefix_llama", **OPTIONS)
    with pytest.raises(CheckpointError, match="adapter_config.json is missing"):
        LLM(MODELS / "llama_gqa", adapter=tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        LLM(MODELS / "llama_mqa_bias", adapter=ADAPTERS / "lora_llama", **OPTIONS)
    with pytest.raises(ConfigError, match="adapter"):
        LLM(MODELS / "llama_gqa", adapter="", **OPTIONS)
    assert decoder("llama_gqa", False).virtual is None
