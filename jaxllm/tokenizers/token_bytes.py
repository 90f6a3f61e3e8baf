"""The bytes that each token stands for: single tokens need not be whole characters."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from jaxllm.tokenizers.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Of one token, with the leading space that `decode` takes off the first. b"" for an id that is no token."""
    if not tokenizer.has_token(token_id):
        return b""
    token = tokenizer.id_to_token[token_id]
    if token_id in _added(tokenizer):
        return token.encode()
    kinds = _decoders(tokenizer)
    if "ByteLevel" in kinds:
        table = _byte_level()
        return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    if "WordPiece" in kinds:
        return token.removeprefix("##").encode() if token.startswith("##") else f" {token}".encode()
    return token.replace("\u2581", " ").encode()


def _decoders(tokenizer: Tokenizer) -> frozenset[str]:
    """The kinds of the steps of its decoder."""
    if not hasattr(tokenizer, "_decoder_kinds"):
        state = None if tokenizer.backend.decoder is None else json.loads(tokenizer.backend.decoder.__getstate__())
        steps = [] if state is None else state.get("decoders", [state])
        tokenizer._decoder_kinds = frozenset(step["type"] for step in steps)
        tokenizer._added_ids = frozenset(tokenizer.backend.get_added_tokens_decoder())
    return tokenizer._decoder_kinds


def _added(tokenizer: Tokenizer) -> frozenset[int]:
    _decoders(tokenizer)
    return tokenizer._added_ids


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in printable):
        table[chr(256 + i)] = byte
    return table
