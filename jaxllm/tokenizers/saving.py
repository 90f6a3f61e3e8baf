"""Writes a tokenizer as the files that transformers (and `load_tokenizer`) read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.tokenizers.tokenizer import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, made if need be; also for a tokenizer that came from a GGUF file.

    Where a generation ends at more ids than the EOS token, generation_config.json says so; a file already there keeps its other fields.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it stands, without a model family's own rules on top.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.model_max_length is not None:
        config["model_max_length"] = tokenizer.model_max_length
    if list(tokenizer.chat_templates) == ["default"]:
        config["chat_template"] = tokenizer.chat_template
    elif tokenizer.chat_templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in tokenizer.chat_templates.items()]
    _write(folder / "tokenizer_config.json", config)
    if len(tokenizer.eos_token_ids) > 1:
        from jaxllm.tokenizers.loading import read_json

        path = folder / "generation_config.json"
        _write(path, {**read_json(path), "eos_token_id": list(tokenizer.eos_token_ids)})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
