"""Embeddings: transformers' hidden states, whatever the prompt shares the engine with."""

import numpy as np
import pytest
from golden_cases import FOLDER, MODELS, golden
from tiny_models import write_llama

from jaxllm import LLM, SamplingParams
from jaxllm.errors import RequestError

SMALL = dict(max_model_len=64, max_num_batched_tokens=16, page_size=4)
CASES = ["gemma2", "gpt2", "llama_gqa", "opt_postnorm_proj", "qwen3"]


def vectors(outputs):
    return np.array([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("case", CASES)
def test_transformers(case):
    llm = LLM(MODELS / case, dtype="float32", skip_tokenizer_init=True, warmup=False, **SMALL)
    prompts = [{"prompt_token_ids": prompt["prompt"].tolist()} for prompt in golden(case)]
    with np.load(FOLDER / "embeddings.npz") as wanted:
        for pooling in ("last", "mean"):
            got = vectors(llm.embed(prompts, pooling=pooling))
            np.testing.assert_allclose(got, [wanted[f"{case}/{pooling}_{i}"] for i in range(3)], atol=2e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["layers", "scanned"])
def llm(request, tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("embed"), num_hidden_layers=2, tokenizer=True)
    # Pages for three of the long prompts below: the others are preempted, and computed again.
    sizes = dict(max_num_seqs=4, max_num_batched_tokens=96, max_model_len=400, page_size=4, num_pages=210)
    return LLM(folder, dtype="float32", scan_layers=request.param, **sizes)


def test_company_chunks_and_cache_change_nothing(llm):
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(5, 100, n).tolist()} for n in (1, 63, 64, 65, 130, 250, 300, 200)]
    for pooling in ("last", "mean"):
        alone = vectors([llm.embed(p, pooling=pooling)[0] for p in prompts])
        np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
        llm.reset_prefix_cache()
        # Generating beside them, with more tokens than there are pages for.
        requests = [llm._add(p | {"pooling": pooling}, SamplingParams(max_tokens=1, temperature=0)) for p in prompts]
        requests += [llm._add(p, SamplingParams(max_tokens=90, ignore_eos=True)) for p in prompts[-3:]]
        while any(llm._news[i] is None or not llm._news[i].finished for i in requests):
            llm._step()
        together = np.array([llm._news[i].embedding for i in requests[: len(prompts)]])
        assert all(llm._news[i].embedding is None for i in requests[len(prompts) :])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        np.testing.assert_allclose(vectors(llm.embed(prompts, pooling=pooling)), alone, atol=1e-5)  # with what is in the cache
    assert llm.engine.scheduler.num_preemptions > 0
    assert llm.engine.runner.stats.compiles_after_warmup == 0


def test_text_and_errors(llm):
    ids = llm.get_tokenizer().encode("once upon a time")
    by_text, by_ids = llm.embed(["once upon a time", {"prompt_token_ids": ids}])
    assert by_text.prompt_token_ids == ids and by_text.outputs.embedding == by_ids.outputs.embedding
    assert by_text.outputs.hidden_size == 32
    with pytest.raises(RequestError, match="pooling must be last or mean, not 'max'"):
        llm.embed("a", pooling="max")
    with pytest.raises(RequestError, match="max_tokens=1"):
        llm.generate({"prompt": "a", "pooling": "last"}, SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="max_model_len"):
        llm.embed({"prompt_token_ids": [5] * 400})
