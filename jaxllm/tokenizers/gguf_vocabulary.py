"""The tokenizer inside a GGUF file: vocabulary, merges, special tokens and chat template from its metadata (ggml's docs/gguf.md)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import TokenizerError
from jaxllm.gguf_file import open_gguf
from jaxllm.tokenizers.loading import set_bos_eos
from jaxllm.tokenizers.sentencepiece_model import CONTROL, NORMAL, SPACE, USER_DEFINED, Pieces, build_backend
from jaxllm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}"
_GPT4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL}"


@dataclass(frozen=True)
class _Rules:
    """What a `tokenizer.ggml.pre` name stands for: patterns that cut text before merging, one after the other, and the model's habits."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a whole word that is a token is taken as it is
    add_bos: bool = False
    nfc: bool = False


_DEFAULT = _Rules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_DIGITS = _Rules((r"\p{N}", _GPT2))
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _Rules((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _Rules((_LLAMA3,), ignore_merges=True, add_bos=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Rules((_LLAMA3.replace("{1,3}", ""),), nfc=True)),
    "tekken": _Rules((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rules((_GPT4O,))),
}

# Names of tokens that end a turn. GGUF files often name only one end token where generation_config.json would list several.
_END_NAMES = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "<|eot|>"}


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file whose `tokenizer.ggml.model` is "gpt2" (byte-level BPE) or "llama" (sentencepiece).

    Raises TokenizerError naming the model or pre-tokenizer if it is another, or if the vocabulary is broken.
    """
    metadata = open_gguf(path).metadata
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise TokenizerError(
            f"{path} has a tokenizer of type {model!r} (tokenizer.ggml.model); implemented are gpt2 and llama. "
            "Use the model's Hugging Face folder instead."
        )
    pieces = _pieces(metadata, path)
    if model == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        warnings.warn(
            f"{path} is an old GGUF file that does not name its pre-tokenizer (tokenizer.ggml.pre); ggml's default is used, which may "
            "not be how the model was trained. Convert the model again to be sure.",
            stacklevel=3,
        )
    if model == "llama" and not {"tokenizer.ggml.scores", "tokenizer.ggml.merges"} & set(metadata):
        raise TokenizerError(f"{path} has neither scores nor merges for its vocabulary. Convert the model again.")
    try:
        backend, add_bos = _byte_level(metadata, pieces, path) if model == "gpt2" else _sentencepiece(metadata, pieces)
    except TokenizerError:
        raise
    except Exception as error:  # the Rust library raises plain Exception, for instance for a merge of tokens that are not there
        raise TokenizerError(f"The vocabulary in {path} is broken: {error}. Convert the model again.") from error
    special_tokens = _special_tokens(metadata, pieces, path, model)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    set_bos_eos(backend, special_tokens, add_bos, add_eos)
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_templates=_chat_templates(metadata),
        extra_eos_token_ids=_end_ids(metadata, pieces),
        model_max_length=None if context is None else int(context),
    )


def _pieces(metadata: Mapping[str, Any], path: Path) -> Pieces:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError(f"{path} has no vocabulary (tokenizer.ggml.tokens). Convert the model again, with its tokenizer.")
    for i, token in enumerate(tokens):
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise TokenizerError(f"Token {i} in {path} is not UTF-8: {token!r}. Convert the model again, or use its Hugging Face folder.")
    types = metadata.get("tokenizer.ggml.token_type")
    scores = metadata.get("tokenizer.ggml.scores")
    types = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    scores = [0.0] * len(tokens) if scores is None else [float(score) for score in scores]
    if not len(tokens) == len(types) == len(scores):
        raise TokenizerError(f"{path} has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores. Convert the model again.")
    return Pieces(tokens, scores, types)


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    merges = metadata.get("tokenizer.ggml.merges")
    # A token may itself begin with a space, so only the first space after the first character parts the two.
    return None if merges is None else [(m[: (cut := m.index(" ", 1))], m[cut + 1 :]) for m in merges]


def _byte_level(metadata: Mapping[str, Any], pieces: Pieces, path: Path) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{path} has the pre-tokenizer {name!r} (tokenizer.ggml.pre), which is not implemented; these are: "
            f"{', '.join(_PRE_TOKENIZERS)}. Use the model's Hugging Face folder instead."
        )
    merges = _merges(metadata)
    if merges is None:
        raise TokenizerError(f"{path} has a BPE vocabulary without merges (tokenizer.ggml.merges). Convert the model again.")
    rules = _PRE_TOKENIZERS[name]
    vocabulary = {text: i for i, text in enumerate(pieces.texts)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules.ignore_merges))
    backend.normalizer = normalizers.NFC() if rules.nfc else None
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == CONTROL]
    plain = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    return backend, rules.add_bos


def _sentencepiece(metadata: Mapping[str, Any], pieces: Pieces) -> tuple[tokenizers.Tokenizer, bool]:
    # Gemma's files spell runs of spaces with real spaces.
    texts = [SPACE * len(text) if text and not text.strip(" ") else text for text in pieces.texts]
    # BPE scores are whole numbers (minus the rank of the merge); log-probabilities are not.
    unigram = any(kind == NORMAL and not score.is_integer() for score, kind in zip(pieces.scores, pieces.types, strict=True))
    backend = build_backend(
        Pieces(texts, pieces.scores, pieces.types),
        "unigram" if unigram else "bpe",
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        merges=_merges(metadata),
        strip_after_special=metadata.get("general.architecture") == "phi3",
    )
    return backend, True


def _special_tokens(metadata: Mapping[str, Any], pieces: Pieces, path: Path, model: str) -> dict[str, str]:
    found = {}
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}  # ggml's
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key))
        if token_id is None:
            continue
        if not 0 <= token_id < len(pieces.texts):
            raise TokenizerError(f"{path} gives tokenizer.ggml.{key}_token_id {token_id}, but has only {len(pieces.texts)} tokens.")
        found[name] = pieces.texts[token_id]
    return found


def _end_ids(metadata: Mapping[str, Any], pieces: Pieces) -> list[int]:
    named = [int(metadata[key]) for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id") if key in metadata]
    kinds = (CONTROL, USER_DEFINED)
    return named + [i for i, text in enumerate(pieces.texts) if text in _END_NAMES and pieces.types[i] in kinds]


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {name: metadata[f"tokenizer.chat_template.{name}"] for name in metadata.get("tokenizer.chat_templates", [])}
    if "tokenizer.chat_template" in metadata:
        templates["default"] = metadata["tokenizer.chat_template"]
    return templates
