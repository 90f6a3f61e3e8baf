"""A KV cache of float8, and the choice of an attention backend."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import MODELS

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.serving import attend

CASE = MODELS / "llama_gqa"
OPTIONS = dict(skip_tokenizer_init=True, warmup=False, max_num_seqs=4, max_num_batched_tokens=32, dtype="float32", compilation_cache_dir="")


def prompt_logprobs(**options):
    """The engine, and the log-probabilities of a prompt's tokens: the same tokens whatever is generated."""
    llm = LLM(CASE, **OPTIONS, **options)
    tokens = np.random.default_rng(0).integers(0, 90, 60).tolist()
    [output] = llm.generate([{"prompt_token_ids": tokens}], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0))
    return llm, np.array([of[token].logprob for of, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)])


def test_float8_halves_the_cache_and_changes_little():
    exact, expected = prompt_logprobs(num_pages=20)
    small, found = prompt_logprobs(num_pages=20, kv_cache_dtype="fp8")
    pages = small.engine.runner.state.kv_pages
    assert pages.dtype == jnp.float8_e4m3fn and 4 * pages.nbytes == exact.engine.runner.state.kv_pages.nbytes
    assert np.isfinite(np.asarray(pages, np.float32)).all()
    assert 0 < np.abs(found - expected).mean() < 0.4  # of random weights, which blow up what is small
    assert abs(found.mean() - expected.mean()) < 0.1


def test_more_pages_fit_into_the_same_memory():
    count = lambda dtype: LLM(CASE, **OPTIONS, kv_cache_memory_bytes=1 << 16, kv_cache_dtype=dtype, max_model_len=8).engine.pool.capacity
    assert 3.5 < count("fp8_e4m3") / count("auto") <= 4.5


@pytest.mark.parametrize(
    "options,message",
    [({"kv_cache_dtype": "int8"}, r"expected auto\|fp8\|fp8_e4m3"), ({"attention_backend": "flash"}, r"expected auto\|xla\|tpu\|gpu")],
)
def test_names_that_are_not_known(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(CASE, **OPTIONS, **options)


def test_a_backend_of_another_device():
    with pytest.raises(ConfigError, match="attention_backend='gpu': its kernels do not run on cpu"):
        prompt_logprobs(attention_backend="gpu")
    assert attend._implementation("xla", Device("gpu", "9.0"), 64, 80, jnp.bfloat16) == "xla"


class Device:
    """As much as is asked of one."""

    def __init__(self, platform, capability=None):
        self.platform, self.device_kind, self.compute_capability = platform, f"a {platform}", capability


@pytest.mark.parametrize(
    "device,pages,chosen,said",
    [
        (Device("gpu", "9.0"), (64, 80, jnp.bfloat16), "gpu", None),
        (Device("gpu", "7.5"), (64, 80, jnp.bfloat16), "xla", "8.0 and later, not 7.5"),
        (Device("tpu"), (64, 128, jnp.bfloat16), "tpu", None),
        (Device("tpu"), (8, 128, jnp.bfloat16), "xla", "page_size 8 is not a multiple of 16"),
        (jax.devices()[0], (8, 64, jnp.float32), "xla", None),
    ],
)
def test_a_device_without_its_kernels_says_why(device, pages, chosen, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert attend._implementation("auto", device, *pages) == chosen
    assert (said in caplog.text) if said else not caplog.text
