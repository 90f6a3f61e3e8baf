"""What the server's tests share: real servers on loopback, in a thread."""

import asyncio
import contextlib
import threading

from jaxllm.server.config import ServerConfig
from jaxllm.server.run import address, listen, make_server
from jaxllm.serving.news import figures_of

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + ' Call: <tool_call>...</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{{ (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<' + 'think>' if think else '') }}{% endif %}"
)


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


def settled(llm):
    """Until the engine has nothing to do; and then nothing is left of what it did."""
    while (now := asyncio.run(llm.ask(figures_of))).requests or llm._pending:
        threading.Event().wait(0.01)
    assert now.free_pages == now.pages and not llm._streams
