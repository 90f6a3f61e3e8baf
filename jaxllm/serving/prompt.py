"""The forms of a prompt."""

from collections.abc import Sequence
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.serving.sampling_params import SamplingParams
from jaxllm.tokenizers import Tokenizer

Prompt = str | dict[str, Any]
_LABELS = ("cache_salt", "tenant", "pooling")
_KEYS = {"prompt", "prompt_token_ids", *_LABELS}


def read_labels(prompt: Prompt) -> dict[str, str]:
    """What a dict says beside the prompt: `cache_salt`, with whom it shares the KV cache, `tenant`, whom it is for, and `pooling`,
    how its hidden states become an embedding. Raises RequestError."""
    labels = {name: prompt[name] for name in _LABELS if prompt.get(name) is not None} if isinstance(prompt, dict) else {}
    for name, label in labels.items():
        if not isinstance(label, str) or not label:
            raise RequestError(f"{name} must be a string that is not empty, not {label!r:.100}")
    return labels


def read_prompt(prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[str | None, Sequence[int]]:
    """Text and token ids of a prompt: a string, `{"prompt": str}` or `{"prompt_token_ids": [int]}`. Raises RequestError.

    A dict may have a `cache_salt`, a `tenant` and a `pooling` too, which `read_labels` reads.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be a SamplingParams, not {type(params).__name__}")
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, dict) or not set(prompt) <= _KEYS or not set(prompt) - set(_LABELS):
        raise RequestError(f"a prompt is a string, {{'prompt': ...}} or {{'prompt_token_ids': [...]}}, not {prompt!r:.200}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"the text of a prompt must be a string, not {type(text).__name__}")
    if ids is None:
        return text, need_tokenizer(tokenizer).encode(text)
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise RequestError(f"prompt_token_ids must be a list of token ids, not {type(ids).__name__}")
    return text, ids


def need_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Raises RequestError if an engine has none."""
    if tokenizer is None:
        raise RequestError("this engine was made with skip_tokenizer_init: it has no tokenizer")
    return tokenizer
