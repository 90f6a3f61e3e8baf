"""SentencePiece vocabularies as `tokenizers.Tokenizer`: the file tokenizer.model, and the pieces and scores that GGUF files carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

# Types of a piece; sentencepiece_model.proto and GGUF's token_type number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how pieces spell a space

# Classes in tokenizer_config.json whose ids are those of tokenizer.model; others shift or extend them.
_PLAIN_CLASSES = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "MistralTokenizer", "PreTrainedTokenizer", "TokenizersBackend"}


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: the n-th piece has id n. `scores` rank merges (BPE) or are log-probabilities (unigram)."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]


def load_sentencepiece(path: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """tokenizer.model and the special tokens that it names. `config` is tokenizer_config.json, or {}.

    Follows `legacy`, `add_prefix_space`, `add_bos_token` and `add_eos_token` of the configuration as LlamaTokenizer does: legacy puts a
    space before every stretch of text between special tokens, otherwise only the text's start gets one.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise TokenizerError(f"Reading {path} needs protobuf and sentencepiece: pip install protobuf sentencepiece ({error}).") from error

    kind = (config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
    if kind not in _PLAIN_CLASSES:
        raise TokenizerError(
            f"{path.parent} says tokenizer_class {kind!r}, whose ids differ from those in tokenizer.model, and has no tokenizer.json: "
            "load and save it once with transformers to get one."
        )
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError moves between its versions
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}. Copy the file again.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    algorithms = {trainer.UNIGRAM: "unigram", trainer.BPE: "bpe"}
    if not proto.pieces or trainer.model_type not in algorithms:
        raise TokenizerError(f"{path} is not a sentencepiece model of type unigram or BPE; word and char models are not implemented.")
    pieces = Pieces(*zip(*((piece.piece, piece.score, piece.type) for piece in proto.pieces), strict=True))
    prefix = config.get("add_prefix_space")
    prefix = normalizer.add_dummy_prefix if prefix is None else bool(prefix)
    algorithm = algorithms[trainer.model_type]
    backend = build_backend(pieces, algorithm, add_prefix_space=prefix)
    _set_normalizer(backend, normalizer, prefix, algorithm, legacy=bool(config.get("legacy", False)))
    special_tokens = {
        name: pieces.texts[token_id]
        for name, token_id in (("bos_token", trainer.bos_id), ("eos_token", trainer.eos_id), ("unk_token", trainer.unk_id))
        if token_id >= 0
    }
    if config.get("add_bos_token") is None and config.get("add_eos_token") is None:
        from jaxllm.tokenizers.loading import set_bos_eos

        set_bos_eos(backend, special_tokens, add_bos=True, add_eos=False)  # LlamaTokenizer's defaults
    return backend, special_tokens


def _set_normalizer(backend: tokenizers.Tokenizer, spec: Any, prefix: bool, algorithm: str, legacy: bool) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if algorithm == "bpe":
        # transformers' LlamaTokenizer: text that begins with a space gets no second one.
        scheme = "never" if not prefix else "always" if legacy else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        steps += _spaces_to_pieces(prefix)
    backend.normalizer = normalizers.Sequence(steps) if steps else None


def _spaces_to_pieces(prefix: bool) -> list[Any]:
    """sentencepiece's own rule: always one more space in front, then every space becomes `▁`."""
    from tokenizers import normalizers

    return [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]


def build_backend(
    pieces: Pieces,
    algorithm: str,
    *,
    add_prefix_space: bool,
    merges: list[tuple[str, str]] | None = None,
    strip_after_special: bool = False,
) -> tokenizers.Tokenizer:
    """A tokenizer of these pieces, with sentencepiece's handling of spaces. `algorithm` is "bpe" or "unigram".

    BPE merges are derived from the scores unless given. `strip_after_special`: control tokens swallow the white space after them (Phi-3).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    unknown = next((i for i, kind in enumerate(pieces.types) if kind == UNKNOWN), None)
    byte_fallback = BYTE in pieces.types
    if algorithm == "bpe":
        vocabulary = {text: i for i, text in enumerate(pieces.texts)}
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, pieces) if merges is None else merges,
            unk_token=None if unknown is None else pieces.texts[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        scored = [(text, float(score)) for text, score in zip(pieces.texts, pieces.scores, strict=True)]
        model = models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(_spaces_to_pieces(add_prefix_space))
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix_space else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for text, kind in zip(pieces.texts, pieces.types, strict=True):
        # The unknown token is special too (transformers hides it when it decodes).
        if kind in (CONTROL, UNKNOWN):
            rstrip = strip_after_special and text not in ("<unk>", "<s>", "<|endoftext|>")
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True, rstrip=rstrip)])
        # Runs of spaces are reached by merges: as added tokens they would be looked for before spaces become `▁`.
        elif kind == USER_DEFINED and text.strip(SPACE + " "):
            backend.add_tokens([AddedToken(text, normalized=False, special=False)])
    return backend


def _merges_from_scores(vocabulary: dict[str, int], pieces: Pieces) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first (sentencepiece keeps no list of merges)."""
    left_out = {text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in (UNKNOWN, CONTROL, UNUSED, BYTE)}
    ranked = []
    for text, score, token_id in zip(pieces.texts, pieces.scores, range(len(pieces.texts)), strict=True):
        if text in left_out:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary and left not in left_out and right not in left_out:
                ranked.append((-float(score), token_id, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
