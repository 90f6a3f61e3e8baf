"""From what a model says to what it means: thoughts, content, calls of tools. A parser for each way that models were taught."""

from jaxllm.server.tools.events import Arguments, Call, Content, Event, Parser, Thought
from jaxllm.server.tools.json_calls import Hermes, Llama3, Mistral, Required
from jaxllm.server.tools.pythonic import Pythonic
from jaxllm.server.tools.reasoning import Reasoning

PARSERS = {"hermes": Hermes, "llama3_json": Llama3, "mistral": Mistral, "pythonic": Pythonic}
_SIGNS = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


def guess_parser(template: str | None) -> str | None:
    """The one whose words the chat template has: it shows the model its own earlier calls."""
    return next((name for name, sign in _SIGNS.items() if template is not None and sign in template), None)


__all__ = [
    "PARSERS", "Arguments", "Call", "Content", "Event", "Hermes", "Llama3", "Mistral", "Parser", "Pythonic", "Reasoning", "Required",
    "Thought", "guess_parser",
]  # fmt: skip
