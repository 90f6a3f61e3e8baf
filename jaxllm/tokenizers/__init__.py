"""Text to token ids and back: tokenizer.json, sentencepiece and GGUF vocabularies, chat templates, incremental detokenisation."""

from jaxllm.tokenizers.detokenizer import IncrementalDetokenizer
from jaxllm.tokenizers.loading import load_tokenizer
from jaxllm.tokenizers.saving import save_tokenizer
from jaxllm.tokenizers.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_tokenizer", "save_tokenizer"]
