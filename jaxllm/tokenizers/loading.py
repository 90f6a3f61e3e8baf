"""Finds and reads the tokenizer of a model: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import TokenizerError
from jaxllm.tokenizers.tokenizer import SPECIAL_TOKEN_NAMES, Tokenizer

if TYPE_CHECKING:
    import tokenizers


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: `path` is a Hugging Face folder (tokenizer.json, else tokenizer.model) or a .gguf file.

    Raises TokenizerError if the files are missing, broken, or of a kind that is not implemented.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        from jaxllm.tokenizers.gguf_vocabulary import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise TokenizerError(f"No tokenizer at {path}: it {what}. Give a Hugging Face model folder or a .gguf file.")


def _load_folder(folder: Path) -> Tokenizer:
    config = read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, read_json(folder / "special_tokens_map.json"))
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        from jaxllm.tokenizers.sentencepiece_model import load_sentencepiece

        backend, defaults = load_sentencepiece(folder / "tokenizer.model", config)
        special_tokens = defaults | special_tokens
    else:
        raise TokenizerError(
            f"{folder} has neither tokenizer.json nor tokenizer.model. Copy one from the model's repository; other kinds (tekken.json, "
            "tiktoken files, vocab.json with merges.txt) become tokenizer.json when transformers loads and saves them."
        )
    _add_tokens(backend, config, special_tokens, folder)
    if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
        set_bos_eos(backend, special_tokens, bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    max_length = config.get("model_max_length")
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_templates=_chat_templates(folder, config),
        extra_eos_token_ids=[] if eos is None else eos if isinstance(eos, list) else [eos],
        # transformers writes a number near 1e30 for "unknown".
        model_max_length=int(max_length) if max_length and max_length < 1e18 else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"Cannot read {path}: {error}. Copy the file again.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, but it holds a {type(content).__name__}. Copy the file again.")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise TokenizerError(
            f"{path} cannot be read by the tokenizers library, version {tokenizers.__version__}: {error}. "
            "Copy the file again, or update tokenizers."
        ) from error


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """The named special tokens; the first source that names one wins. A token is a string, or an object with its "content"."""
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_TOKEN_NAMES:
            value = source.get(name)
            if value is not None:
                found.setdefault(name, value["content"] if isinstance(value, dict) else value)
    return found


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str], folder: Path) -> None:
    """Adds the tokens that tokenizer_config.json declares beside tokenizer.json, at the ids that it declares."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = sorted((int(token_id), fields) for token_id, fields in (config.get("added_tokens_decoder") or {}).items())
    for token_id, fields in declared:
        content = fields["content"]
        if content not in known:
            options = {key: fields[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in fields}
            backend.add_tokens([AddedToken(content, **options)])
        if backend.token_to_id(content) != token_id:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'} gives the added token {content!r} the id {token_id}, but the vocabulary gives it "
                f"{backend.token_to_id(content)}: the files do not belong together. Copy them all from one repository."
            )
    known.update(fields["content"] for _, fields in declared)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens.values() if token not in known])


def set_bos_eos(backend: tokenizers.Tokenizer, special_tokens: dict[str, str], add_bos: bool, add_eos: bool) -> None:
    """Makes `encode(add_special_tokens=True)` put the BOS token before the text and the EOS token after it, or not."""
    from tokenizers.processors import TemplateProcessing

    bos = special_tokens.get("bos_token") if add_bos else None
    eos = special_tokens.get("eos_token") if add_eos else None
    template = [token for token in (bos, "$A", eos) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=template,
        pair=[*template, *(f"{token}:1" for token in template[:-1] if token != "$A"), "$B:1", *([f"{eos}:1"] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None],
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name, from all the places where models keep them; the newer the convention, the more it counts."""
    templates: dict[str, str] = {}
    for source in (config.get("chat_template"), read_json(folder / "chat_template.json").get("chat_template")):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            templates |= {entry["name"]: entry["template"] for entry in source}
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return templates | {name: file.read_text(encoding="utf-8") for name, file in files.items()}
