"""Log-probabilities in OpenAI's two forms, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.serving.request import Logprob
from jaxllm.tokenizers import Tokenizer
from jaxllm.tokenizers.token_bytes import token_bytes

Logprobs = Sequence[dict[int, Logprob] | None]
_LEAST = -9999.0  # JSON has no -inf; vLLM's clamp


@dataclass(frozen=True)
class TokenNames:
    """How tokens are written; `as_ids`: as `token_id:7`, which no two tokens share (vLLM's `return_tokens_as_token_ids`)."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def bytes(self, token: int) -> bytes:
        return token_bytes(self.tokenizer, token)

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.bytes(token).decode("utf-8", "replace")


def chat_logprobs(tokens: Sequence[int], logprobs: Logprobs, top: int, names: TokenNames) -> dict[str, Any]:
    """The form of /v1/chat/completions."""
    one = lambda token, logprob: {"token": names(token), "logprob": max(logprob.logprob, _LEAST), "bytes": list(names.bytes(token))}
    return {
        "content": [
            one(token, likely[token]) | {"top_logprobs": [one(i, value) for i, value in _top(likely, top)]}
            for token, likely in zip(tokens, logprobs, strict=True)
        ]
    }


def legacy_logprobs(tokens: Sequence[int], logprobs: Logprobs, top: int, names: TokenNames, offset: int) -> dict[str, Any]:
    """The form of /v1/completions. `offset`: characters of the text before the first of these tokens."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(names(token))

    def tops(token: int, likely: dict[int, Logprob]) -> dict[str, float]:
        """The likeliest, and the token itself."""
        return {names(i): max(value.logprob, _LEAST) for i, value in {**dict(_top(likely, top)), token: likely[token]}.items()}

    pairs = list(zip(tokens, logprobs, strict=True))
    return {
        "text_offset": offsets,
        "token_logprobs": [None if likely is None else max(likely[token].logprob, _LEAST) for token, likely in pairs],
        "tokens": [names(token) for token in tokens],
        "top_logprobs": [None if likely is None else tops(token, likely) for token, likely in pairs] if top else None,
    }


def prompt_logprobs(logprobs: Logprobs | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt, {token id: {logprob, rank, decoded_token}}."""
    if logprobs is None:
        return None
    one = lambda value: {"logprob": max(value.logprob, _LEAST), "rank": value.rank, "decoded_token": value.decoded_token}
    return [None if likely is None else {str(token): one(value) for token, value in likely.items()} for likely in logprobs]


def _top(likely: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The likeliest, the likeliest first; the drawn token is among them only if it is one."""
    return sorted(((i, value) for i, value in likely.items() if value.rank <= count), key=lambda pair: pair[1].rank)[:count]
