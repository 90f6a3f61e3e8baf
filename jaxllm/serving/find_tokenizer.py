"""The tokenizer that goes with an engine's model."""

from pathlib import Path

from jaxllm.checkpoints import resolve_model
from jaxllm.serving.config import EngineConfig
from jaxllm.tokenizers import Tokenizer, load_tokenizer


def read_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """None where the engine is to have none. Raises TokenizerError or CheckpointError."""
    if config.skip_tokenizer_init:
        return None
    return load_tokenizer(resolve_model(config.tokenizer, only="tokenizer") if config.tokenizer else _beside(resolve_model(config.model)))


def _beside(path: Path) -> Path:
    """A folder whose only checkpoint is one GGUF file keeps its tokenizer in it."""
    if path.is_dir() and not (path / "tokenizer.json").exists() and not (path / "tokenizer.model").exists():
        ggufs = list(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
    return path
