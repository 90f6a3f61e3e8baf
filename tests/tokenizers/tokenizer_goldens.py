"""Where the goldens lie, and where the demo model does."""

import json
import os
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"


def golden(name: str) -> Any:
    return json.loads((GOLDENS / name).read_text())


def demo_gguf() -> Path:
    """The demo model's file: named by JAXLLM_TEST_DEMO_GGUF, else fetched if need be. Raises CheckpointError if it cannot be had."""
    if path := os.environ.get("JAXLLM_TEST_DEMO_GGUF"):
        return Path(path)
    from jaxllm.checkpoints import resolve_model

    return resolve_model("demo", progress=False)
