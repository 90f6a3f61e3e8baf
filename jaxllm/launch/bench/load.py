"""What `bench serve` asks for, and when: drawn at random, or taken from files that others have published."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 512  # tokens that one of Mooncake's hash ids stands for
_FIRST = 200  # ids below are often special


@dataclass(frozen=True)
class LoadRequest:
    """`at`: seconds from the beginning, where a trace says it."""

    prompt: str | list[int]
    output_len: int
    at: float | None = None


def random_load(
    rng: np.random.Generator, count: int, *, input_len: int, output_len: int, range_ratio: float, prefix_len: int, vocab_size: int
) -> list[LoadRequest]:
    """Prompts of random token ids: lengths uniform within `range_ratio` of those given, the first `prefix_len` tokens common."""
    prefix = _tokens(rng, prefix_len, vocab_size)
    length = lambda mean: int(rng.integers(max(1, round(mean * (1 - range_ratio))), max(1, round(mean * (1 + range_ratio))) + 1))
    return [LoadRequest(prefix + _tokens(rng, length(input_len), vocab_size), length(output_len)) for _ in range(count)]


def sharegpt_load(path: str, count: int, output_len: int | None) -> list[LoadRequest]:
    """The first two turns of each conversation, in a JSON list or a line each: {"conversations": [{"from", "value"}, ...]}. A word is
    taken for 4/3 tokens, where `output_len` does not say how long answers may be."""
    text = _read(path)
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
        pairs = [[turn["value"] for turn in (record.get("conversations") or record["conversation"])[:2]] for record in records]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not ShareGPT's form: {error!r}") from error
    found = [LoadRequest(pair[0], output_len or max(1, len(pair[1].split()) * 4 // 3)) for pair in pairs if len(pair) == 2 and pair[0]]
    return _enough(found, count, path)


def trace_load(rng: np.random.Generator, path: str, count: int, *, vocab_size: int) -> list[LoadRequest]:
    """Azure's LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's (JSONL: timestamp in ms,
    input_length, output_length, hash_ids: equal ids are equal blocks of 512 tokens)."""
    try:
        rows = list(_mooncake(_read(path)) if path.endswith((".jsonl", ".json")) else _azure(_read(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: neither Azure's trace nor Mooncake's: {error!r}") from error
    found = []
    for at, input_len, output_len, blocks in rows[:count]:
        tokens = [token for block in blocks for token in _tokens(_seeded(block), _BLOCK, vocab_size)][:input_len]
        tokens += _tokens(rng, input_len - len(tokens), vocab_size)
        found.append(LoadRequest(tokens, max(1, output_len), at - rows[0][0]))
    return _enough(found, count, path)


def arrivals(rng: np.random.Generator, count: int, rate: float, burstiness: float) -> Iterator[float]:
    """Seconds from the beginning: gamma-distributed gaps, which a burstiness of 1 makes a Poisson process (as in vLLM)."""
    at = 0.0
    for _ in range(count):
        yield at
        at += float(rng.gamma(burstiness, 1 / (rate * burstiness)))


def _azure(text: str) -> Iterator[tuple[float, int, int, Iterable[Any]]]:
    for row in csv.DictReader(text.splitlines()):
        stamp = row["TIMESTAMP"].strip().removesuffix("+00:00")
        head, _, fraction = stamp.partition(".")
        at = datetime.fromisoformat(head).timestamp() + float(f"0.{fraction or 0}")
        yield at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()


def _mooncake(text: str) -> Iterator[tuple[float, int, int, Iterable[Any]]]:
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            yield row["timestamp"] / 1000, row["input_length"], row["output_length"], row.get("hash_ids", ())


def _seeded(block: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(block)


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    return rng.integers(min(_FIRST, vocab_size - 1), vocab_size, max(0, count)).tolist()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _enough(found: list[LoadRequest], count: int, path: str) -> list[LoadRequest]:
    if not found:
        raise ConfigError(f"{path} has no request that could be sent")
    return found[:count]
