"""A tiny model behind real servers on loopback."""

import asyncio
import os

import openai
import pytest
from compile_cache import quickly
from servers import CHATML, serving
from tiny_models import write_llama

from jaxllm import AsyncLLM


@pytest.fixture(scope="module", autouse=True)
def _quickly(compiled_quickly):
    pass


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("server") / "model", tokenizer=True, eos_token_id=4)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def llm(folder):
    there = bool(os.environ.get("JAXLLM_TEST_ENGINE_PROCESS"))  # all these tests hold for an engine in another process too
    options = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=2000, page_size=4)
    with quickly():
        engine = AsyncLLM(folder, engine_process=there, **options)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def server(llm):
    with serving(llm) as (where, _):
        yield where


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ask(llm):
    """What the engine itself answers: ask(prompt, SamplingParams)."""

    def ask(prompt, params):
        async def run():
            return [output async for output in llm.generate(prompt, params)][-1]

        return asyncio.run(run())

    return ask
