"""What a run tells of itself: metrics.jsonl, a line on the terminal, and model FLOPs utilisation."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import CheckpointError
from jaxllm.models import ModelConfig
from jaxllm.sharding.chips import TPUS


class MetricsLog:
    """`metrics.jsonl`, a JSON object a line. A resumed run's lines after its checkpoint are dropped: they come again."""

    def __init__(self, file: Path, step: int):
        self.file = file
        if file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            temporary = file.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(temporary, file)

    def write(self, values: dict[str, Any]) -> None:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        try:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.file} ({error.strerror}): make room; the run goes on from its last save") from error

    def close(self) -> None:
        """Every line is in the file already."""


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short when the process was killed
        return math.inf


class Progress:
    """One line on stderr: rewritten on a terminal, else printed now and then."""

    def __init__(self, total: int | None, first: int, silent: bool = False):
        self.total, self.first, self.start, self.told = total, first, time.monotonic(), 0.0
        self.silent, self.live = silent, sys.stderr.isatty() and not silent

    def show(self, step: int, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.silent or not self.live and now - self.told < 10 and step != self.total:
            return
        self.told = now
        parts = [f"step {step}" + (f"/{self.total}" if self.total else "")]
        parts += [f"{name} {values[name]:.4g}" for name in ("loss", "learning_rate", "tokens_per_s", "mfu") if values.get(name) is not None]
        if self.total and step > self.first:
            left = (now - self.start) / (step - self.first) * (self.total - step)
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        print(("\r\x1b[K" if self.live else "") + "  ".join(parts), end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print(file=sys.stderr)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all but norms and the embedding table, whose rows are looked up."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.hidden_size * c.intermediate_size * (3 if c.gated_mlp else 2)
    return c.num_layers * (attention + mlp) + c.vocab_size * c.embedding_dim


def training_flops(config: ModelConfig, lengths_squared: float, tokens: float, *, frozen: bool) -> float:
    """Operations that a step must do, nothing computed twice: 6 a parameter and token (4 where the weights are frozen: no gradient
    of theirs), and attention over half of each segment's square, as it is causal (Hoffmann et al., arXiv 2203.15556, appendix F;
    Dao, arXiv 2307.08691, section 4.1). Sliding windows are not taken off."""
    passes = 2 if frozen else 3
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * lengths_squared / 2
    return passes * 2 * matmul_parameters(config) * tokens + 3 * attention


def peak_flops(devices: list[jax.Device]) -> float | None:
    """bfloat16 operations a second that the maker publishes of TPUs, together; None for other devices."""
    return next((chip.flops * len(devices) for chip in TPUS.values() if devices[0].device_kind in chip.device_kinds), None)
