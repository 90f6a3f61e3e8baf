"""Every family through the engine: 32 greedy tokens decoded one by one out of the page pool, as transformers decodes them."""

import json
import shutil

import pytest
from golden_cases import CASES, LENGTH, MODELS, OLD_CONFIGS, generated, golden

from jaxllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Prompts of 5, 21 and 40 tokens in steps of 16, two at a time: they are cut into chunks, wait, and share steps with decodes.
OPTIONS = dict(dtype="float32", max_num_seqs=2, max_num_batched_tokens=16, page_size=4, max_model_len=LENGTH + 8)
OPTIONS |= dict(skip_tokenizer_init=True, warmup=False)  # only what is run is compiled
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def prompts(case):
    return [{"prompt_token_ids": reference["prompt"].tolist()} for reference in golden(case)]


# Each is another in how angles are made, in names of weights or within a layer: tests/models holds their logits to transformers', and the
# engine makes no difference between them and the others of their family.
_ALIKE = ["falcon3", "gemma3_conditional", "gemma3_text", "llama_mha_tied", "llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn",
          "llama_rope_yarn_mscale", "mistral_nowindow", "opt_prenorm", "phi3_partial_rotary", "qwen2"]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in _ALIKE else ()) for case in CASES])
def test_greedy_tokens(case):
    llm = LLM(MODELS / case, **OPTIONS)
    together = [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)]
    assert together == generated(case)
    assert llm.engine.pool.num_free == llm.engine.pool.capacity


@pytest.mark.parametrize("case", ["llama_gqa", "gemma3_text", "phi3_longrope", "opt_postnorm_proj"])
def test_scanned_layers(case):
    llm = LLM(MODELS / case, scan_layers=True, **OPTIONS)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)] == generated(case)


# Heads that divide, key/value heads that are repeated, a vocabulary kept whole, full-width query norms.
_FAST = [("llama_gqa", 2), ("gemma2", 4), ("llama_mqa_bias", 4), ("olmo2", 2)]


@pytest.mark.parametrize(
    "case,size",
    [pytest.param(case, size, marks=[] if (case, size) in _FAST else pytest.mark.slow) for case in CASES for size in (2, 4)],
)
def test_tensor_parallel(case, size):
    llm = LLM(MODELS / case, tensor_parallel_size=size, scan_layers=size == 4, **OPTIONS)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)] == generated(case)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma3_text_5to1", "llama_rope_dynamic", "phi3_longrope"])
def test_preemption_changes_nothing(case):
    """Room for little more than one request: the younger one is thrown out and computed again."""
    llm = LLM(MODELS / case, **{**OPTIONS, "max_model_len": LENGTH}, num_pages=-(-LENGTH // 4) + 3)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)] == generated(case)
    assert llm.engine.scheduler.num_preemptions > 0
    assert llm.engine.pool.num_free == llm.engine.pool.capacity


@pytest.mark.parametrize("case", OLD_CONFIGS[:2])
def test_checkpoints_from_before_transformers_5(case, tmp_path):
    folder = tmp_path / case
    shutil.copytree(MODELS / case, folder)
    (folder / "config.old.json").rename(folder / "config.json")
    assert "rope_parameters" not in json.loads((folder / "config.json").read_text())
    llm = LLM(folder, **OPTIONS)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts(case), GREEDY)] == generated(case)
