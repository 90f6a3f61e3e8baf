"""A tiny model behind real servers on loopback."""

import asyncio
import contextlib
import threading

import openai
import pytest
from tiny_models import write_llama

from jaxllm import AsyncLLM
from jaxllm.server.config import ServerConfig
from jaxllm.server.run import address, listen, make_server

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + ' Call: <tool_call>...</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{{ (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("server") / "model", tokenizer=True, eos_token_id=4)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def llm(folder):
    engine = AsyncLLM(folder, dtype="float32", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=2000, page_size=4)
    yield engine
    engine.shutdown()


@contextlib.contextmanager
def serving(llm, **settings):
    """A server of `llm` in a thread; yields the address, and the Server."""
    config = ServerConfig(**{"port": 0, "served_model_name": ("tiny",)} | settings)
    listener, server = listen(config), make_server(llm, config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    try:
        yield address(config, listener), server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


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


def settled(llm):
    """Until the engine has nothing to do; and then nothing is left of what it did."""
    while llm.engine.has_work or llm._inbox or llm._pending:
        threading.Event().wait(0.01)
    assert llm.engine.pool.num_free == llm.engine.pool.capacity and not llm._streams
