"""The forms of a prompt."""

from collections.abc import Sequence
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.serving.engine import Engine, get_tokenizer
from jaxllm.serving.request import SamplingParams

Prompt = str | dict[str, Any]
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


def read_salt(prompt: Prompt) -> str | None:
    """What `{..., "cache_salt": str}` says: with whom a prompt shares the KV cache. Raises RequestError."""
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt must be a string that is not empty, not {salt!r:.100}")
    return salt


def read_prompt(prompt: Prompt, params: SamplingParams, engine: Engine) -> tuple[str | None, Sequence[int]]:
    """Text and token ids of a prompt: a string, `{"prompt": str}` or `{"prompt_token_ids": [int]}`. Raises RequestError.

    A dict may have a `cache_salt` too, which `read_salt` reads.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be a SamplingParams, not {type(params).__name__}")
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, dict) or not set(prompt) <= _KEYS or not set(prompt) - {"cache_salt"}:
        raise RequestError(f"a prompt is a string, {{'prompt': ...}} or {{'prompt_token_ids': [...]}}, not {prompt!r:.200}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"the text of a prompt must be a string, not {type(text).__name__}")
    if ids is None:
        return text, get_tokenizer(engine).encode(text)
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise RequestError(f"prompt_token_ids must be a list of token ids, not {type(ids).__name__}")
    return text, ids
