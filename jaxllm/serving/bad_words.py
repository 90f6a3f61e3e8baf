"""bad_words as tokens."""

from jaxllm.errors import RequestError
from jaxllm.tokenizers import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the beginning of a text, and as it is in the middle, after a space.

    As in vLLM, the second counts only if the space makes another first token, and not one more. Raises RequestError for a word
    that has no tokens.
    """
    banned: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
        if not plain:
            raise RequestError(f"bad_words has {word!r}, which has no tokens")
        banned.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            banned.append(spaced)
    return tuple(banned)
