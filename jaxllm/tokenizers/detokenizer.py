"""Token ids to text, a few at a time, without ever taking back a character.

The decoder of a `tokenizers.Tokenizer` is a chain of steps over the list of token strings. Each step is rebuilt here as a stage that
takes the list piece by piece and holds back only what later tokens could still change. So the pieces join to exactly what
`Tokenizer.decode` gives for all ids at once, at constant cost per token.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from jaxllm.errors import TokenizerError
from jaxllm.tokenizers.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text that never changes once it is returned.

    `prompt_ids` come before the generated ids: they decide whether the first generated token is at the start of the text (and so loses
    its leading space), and complete a character that the prompt broke off. Their own text is not returned.

    Raises TokenizerError if the tokenizer's decoder is of a kind that cannot be streamed.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        decoder = tokenizer.backend.decoder
        self._stages = _stages(None if decoder is None else json.loads(decoder.__getstate__()))
        self._drop = 0  # characters still to come that belong to the prompt
        if len(prompt_ids):
            self.add(prompt_ids)
            held_back = copy.deepcopy(self).finish()
            # What the prompt leaves held back is either finished text, which is the prompt's, or the start of a character, which is not.
            self._drop = 0 if REPLACEMENT in held_back else len(held_back)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` make final. Raises RequestError if an id is not in the vocabulary."""
        names = self._tokenizer.id_to_token
        pieces = [names[i] for i in self._tokenizer.check_ids(token_ids) if i not in self._skipped]
        for stage in self._stages:
            pieces = stage.push(pieces)
        return self._emit(pieces)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD where the ids end inside a character. Call it once, after the last `add`."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.push(pieces) + stage.finish()
        return self._emit(pieces)

    def _emit(self, pieces: list[str]) -> str:
        text = "".join(pieces)
        dropped = min(self._drop, len(text))
        self._drop -= dropped
        return text[dropped:]

    def __deepcopy__(self, memo: dict) -> IncrementalDetokenizer:
        twin = copy.copy(self)  # the tokenizer is shared, the stages are not
        twin._stages = copy.deepcopy(self._stages, memo)
        return twin


class Stage(Protocol):
    """One step of the decoder chain."""

    def push(self, pieces: list[str]) -> list[str]:
        """Takes the next pieces, returns those that can no longer change."""
        ...

    def finish(self) -> list[str]:
        """Returns what was held back."""
        ...


class _PerPiece:
    """A step that looks at one piece at a time, whatever its neighbours; subclasses define `change`."""

    def push(self, pieces: list[str]) -> list[str]:
        return [self.change(piece) for piece in pieces]

    def finish(self) -> list[str]:
        return []


class _Replace(_PerPiece):
    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def change(self, piece: str) -> str:
        return piece.replace(self.old, self.new)


class _StripPiece(_PerPiece):
    """Takes up to `left` and `right` copies of a character off the ends of every piece."""

    def __init__(self, character: str, left: int, right: int):
        self.character, self.left, self.right = character, left, right

    def change(self, piece: str) -> str:
        start = min(self.left, len(piece) - len(piece.lstrip(self.character)))
        end = min(self.right, len(piece) - len(piece.rstrip(self.character)))
        return piece[start : max(start, len(piece) - end)]


class _StripText(_PerPiece):
    """Takes up to `left` copies of a character off the start of the whole text."""

    def __init__(self, character: str, left: int):
        self.character, self.left = character, left

    def change(self, piece: str) -> str:
        taken = min(self.left, len(piece) - len(piece.lstrip(self.character)))
        # Any other character ends the leading run for good; a piece that was all stripped, or empty, does not.
        self.left = self.left - taken if taken == len(piece) else 0
        return piece[taken:]


class _Metaspace(_PerPiece):
    """Spaces for the replacement character; the first piece loses them where encoding had prepended one."""

    def __init__(self, replacement: str, prepended: bool):
        self.replacement, self.first = replacement, prepended

    def change(self, piece: str) -> str:
        space, self.first = ("" if self.first else " "), False
        return piece.replace(self.replacement, space)


class _JoinWithSpaces(_PerPiece):
    """What `tokenizers` does where there is no decoder."""

    first = True

    def change(self, piece: str) -> str:
        space, self.first = ("" if self.first else " "), False
        return space + piece


class _ByteLevel:
    """GPT-2's alphabet back to bytes, and those to UTF-8. Only an unfinished character is held back."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self.decoder.decode(b"".join(map(_to_bytes, pieces)))]

    def finish(self) -> list[str]:
        return [self.decoder.decode(b"", final=True)]

    def __deepcopy__(self, memo: dict) -> _ByteLevel:
        twin = _ByteLevel()  # codecs cannot be deep-copied, but give and take their state
        twin.decoder.setstate(self.decoder.getstate())
        return twin


class _ByteFallback:
    """Runs of `<0xE2>`-like pieces to text. A run that is not UTF-8 as a whole becomes one U+FFFD per byte, so it is held until it ends."""

    pattern = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self):
        self.run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out = []
        for piece in pieces:
            if match := self.pattern.fullmatch(piece):
                self.run.append(int(match[1], 16))
            else:
                out += [*self.finish(), piece]
        return out

    def finish(self) -> list[str]:
        if not self.run:
            return []
        run, self.run = bytes(self.run), bytearray()
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return [REPLACEMENT] * len(run)


def _stages(decoder: dict[str, Any] | None) -> list[Stage]:
    """The stages of a decoder, given as it stands in tokenizer.json."""
    if decoder is None:
        return [_JoinWithSpaces()]
    stages: list[Stage] = []
    fused = False  # after Fuse and ByteLevel the rest of the chain sees the whole text as one piece
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteLevel"}:
                stages.append(_ByteLevel())
                fused = True
            case {"type": "ByteFallback"} if not fused:
                stages.append(_ByteFallback())
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused or len(old) == 1:
                stages.append(_Replace(old, new))
            case {"type": "Strip", "content": character, "start": left, "stop": right} if not fused:
                stages.append(_StripPiece(character, left, right))
            case {"type": "Strip", "content": character, "start": left, "stop": 0}:
                stages.append(_StripText(character, left))
            case {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme} if not fused:
                stages.append(_Metaspace(replacement, scheme != "never"))
            case _:
                raise TokenizerError(
                    f"This tokenizer's decoder step {step} cannot be streamed. Decode the finished ids with Tokenizer.decode instead."
                )
    return stages


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other bytes for the characters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _to_bytes(token: str) -> bytes:
    alphabet = _byte_of_character()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token, spelled in plain text
        return token.encode("utf-8")
