"""Structured output: what a request's text must look like, and which tokens may come next.

llguidance (guidance-ai/llguidance) turns schemas, regular expressions and grammars into a mask of the vocabulary for each
token. The engine has the masks made while the device computes the step that they are for, and puts them where
`allowed_token_ids` are (`slot_state.MaskWriter`), so that the step's programs are the same with and without them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.errors import RequestError
from jaxllm.tokenizers import Tokenizer

if TYPE_CHECKING:
    import llguidance

_FORMS: dict[str, dict[str, Any]] = {
    "json": {"type": ["object", "boolean"]},
    "json_object": {"const": True},
    "regex": {"type": "string"},
    "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    "grammar": {"type": "string"},
    "structural_tag": {"type": ["object", "string"]},
}
# llguidance follows references by recursion: too many of them in a row end the process. Long patterns take it the square of their length.
_LONGEST, _LONGEST_GRAMMAR, _MOST_PATTERNS = 1 << 17, 1 << 15, 1 << 14  # characters: of a schema or choices, of the rest, of its patterns
_MOST_REFERENCES, _MOST_RULES = 2000, 1000  # "$ref"s of a schema, rules of a grammar
_STACK = 256 << 20  # bytes, of the thread that compiles
_BESIDE = {"disable_any_whitespace": {"type": "boolean"}, "thinking": {"enum": ["may", "open", None]}}
SCHEMA: dict[str, Any] = {
    "type": ["object", "null"],
    "oneOf": [
        {"type": "null"},
        *(
            {"type": "object", "properties": {name: form} | _BESIDE, "required": [name], "additionalProperties": False}
            for name, form in _FORMS.items()
        ),
    ],
}


@dataclass(frozen=True)
class StructuredOutputs:
    """One of these, under vLLM's names. Raises ValueError, saying what it must be.

    Attributes:
      json: a JSON schema, as a dict, or as text.
      json_object: any JSON object.
      regex: a regular expression (Rust's, without look-around) for the whole text.
      choice: one of these texts.
      grammar: a context-free grammar, in Lark's form or GBNF (llama.cpp's EBNF).
      structural_tag: any text, in which each of `triggers` begins one of `structures`: its `begin`, JSON of its `schema`, its `end`.
      disable_any_whitespace: JSON without spaces and new lines between its parts.
      thinking: what is said of it holds after `</think>` only, if the output begins with `<think>` (`may`), or as the prompt ends with it
        (`open`); see `thinking.ThinkingMatcher`.
    """

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    thinking: str | None = None

    def __post_init__(self):
        said = [name for name in _FORMS if getattr(self, name) is not None and not (name == "json_object" and self.json_object is False)]
        if len(said) != 1:
            raise ValueError(f"must be one of {', '.join(_FORMS)}, not {' and '.join(said) or 'none of them'}")
        texts = all(value is None or isinstance(value, str) for value in (self.regex, self.grammar))
        if not texts or not isinstance(self.json_object, bool | None) or not isinstance(self.disable_any_whitespace, bool):
            raise ValueError("must have regex and grammar as texts, json_object and disable_any_whitespace as true or false")
        if self.thinking not in (None, "may", "open"):
            raise ValueError("must have thinking as may or open")
        if isinstance(self.json, str | dict | bool):  # kept as text, so that it cannot change
            object.__setattr__(self, "json", _as_text(self.json))
        elif self.json is not None:
            raise ValueError("must have json as a schema")
        if self.choice is not None:
            if not isinstance(self.choice, list | tuple) or not self.choice or not all(isinstance(c, str) and c for c in self.choice):
                raise ValueError("must have choice as a list of texts, none of them empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _check_tags(self.structural_tag))

    def grammar_text(self, special_tokens: Collection[str]) -> str:
        """For llguidance. Raises ValueError."""
        import llguidance

        if self.regex is not None:
            return llguidance.grammar_from("regex", self.regex)
        if self.choice is not None:
            return llguidance.grammar_from("choice", json.dumps(self.choice))
        if self.grammar is not None:
            return llguidance.grammar_from("grammar", self.grammar)
        if self.structural_tag is not None:
            return _tags_grammar(json.loads(self.structural_tag), special_tokens)
        options = {"whitespace_flexible": False} if self.disable_any_whitespace else None
        return llguidance.LLMatcher.grammar_from_json_schema(self.json or '{"type": "object"}', options)


def _as_text(tree: Any) -> str:
    """JSON, or what is to become JSON, as JSON. Raises ValueError."""
    try:
        return json.dumps(json.loads(tree) if isinstance(tree, str) else tree)
    except RecursionError:
        raise ValueError("must not have JSON that is nested so deep") from None


def _check_size(spec: StructuredOutputs) -> None:
    """Raises RequestError."""
    schema = spec.json or spec.structural_tag
    written = spec.regex or spec.grammar or ""
    counts = (
        (len(schema or json.dumps(spec.choice)), _LONGEST, "characters"),
        (len(written), _LONGEST_GRAMMAR, "characters of a regular expression or grammar"),
        (written.replace("::=", ":").count(":") if spec.grammar else 0, _MOST_RULES, "rules (colons)"),
        (schema.count('"$ref"') if schema else 0, _MOST_REFERENCES, "references ($ref)"),
        (_pattern_chars(schema) if schema else 0, _MOST_PATTERNS, "characters of patterns"),
    )
    for count, most, what in counts:
        if count > most:
            raise RequestError(f"structured_outputs: {count} {what} are more than the {most} that are taken")


def _pattern_chars(schema: str) -> int:
    """Of all regular expressions in a schema."""
    found, nodes = 0, [json.loads(schema)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            found += len(node["pattern"]) if isinstance(node.get("pattern"), str) else 0
            found += sum(map(len, node["patternProperties"])) if isinstance(node.get("patternProperties"), dict) else 0
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    return found


_TAGS = "must have structural_tag as {structures: [{begin, schema, end}, ...], triggers: [text, ...]}"


def _check_tags(value: Any) -> str:
    """As text, so that it cannot change. Raises ValueError."""
    tags = json.loads(_as_text(value))
    if isinstance(tags, dict) and tags.get("type") == "structural_tag":
        tags = {name: entry for name, entry in tags.items() if name != "type"}
    if not isinstance(tags, dict) or set(tags) != {"structures", "triggers"}:
        raise ValueError(_TAGS)
    structures, triggers = tags["structures"], tags["triggers"]
    if not all(isinstance(each, list) and each for each in (structures, triggers)) or not all(isinstance(t, str) and t for t in triggers):
        raise ValueError(_TAGS)
    for each in structures:
        if not isinstance(each, dict) or set(each) != {"begin", "schema", "end"}:
            raise ValueError(_TAGS)
        if not (isinstance(each["begin"], str) and isinstance(each["end"], str) and isinstance(each["schema"], dict)):
            raise ValueError(_TAGS)
        if not any(each["begin"].startswith(trigger) for trigger in triggers):
            raise ValueError(f"must have a trigger that {each['begin']!r} begins with, in structural_tag")
    return json.dumps(tags)


def _tags_grammar(tags: dict[str, Any], special_tokens: Collection[str]) -> str:
    """Raises ValueError for triggers of which some are tokens of their own, and others look as if they were."""
    import llguidance

    made = []
    for each in tags["structures"]:
        trigger = next(trigger for trigger in tags["triggers"] if each["begin"].startswith(trigger))
        made.append(llguidance.StructTag(trigger=trigger, begin=each["begin"], grammar=each["schema"], end=each["end"]))
    alike = {tag.trigger in special_tokens for tag in made if tag.trigger.startswith("<") and tag.trigger.endswith(">")}
    if len(alike) > 1:
        raise ValueError("structural_tag: of triggers in <...> either all or none must be special tokens of this model")
    return llguidance.StructTag.to_grammar(made, assume_special=alike == {True})


def parse(value: Any) -> StructuredOutputs | None:
    """As the table of sampling parameters wants it. Raises ValueError, or RequestError for what is too much work."""
    if value is None:
        return None
    if not isinstance(value, StructuredOutputs):
        known = {field.name for field in fields(StructuredOutputs)}
        if not isinstance(value, dict) or not set(value) <= known:
            raise ValueError
        value = StructuredOutputs(**value)
    _check_size(value)
    return value


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self.matcher = matcher

    def copy(self) -> Matcher:
        return Matcher(self.matcher.deep_copy())

    def take(self, token: int) -> bool:
        """The next token was drawn. Returns whether nothing can follow."""
        self.matcher.consume_token(token)
        return self.matcher.is_stopped()

    def widen(self, mask: np.ndarray) -> None:
        """Adds to the tokens (uint32 [V/32]) that may come next."""

    @property
    def error(self) -> str | None:
        """Why it can go no further, if the grammar asks for too much work, or a token came that it does not allow."""
        if not self.matcher.is_error():
            return None
        why = _first_line(self.matcher.get_error())
        return f"structured_outputs: {'it allows no text at all, as it has no end' if 'NoExtensionBias' in why else why}"


_stack_size = threading.Lock()  # that of the threads that are started next is one number for all


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._special: frozenset[str] = frozenset()
        self._lock, self._prepared, self._executor = threading.Lock(), None, None
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def matcher(self, spec: StructuredOutputs) -> Matcher:
        """For one sequence, at its beginning. Takes up to a second. Raises RequestError for a grammar that is none."""
        if spec.thinking is None:
            return self._compiled(spec).copy()
        from jaxllm.serving.thinking import OPENING, ThinkingMatcher

        plain = self._compiled(replace(spec, thinking=None)).copy()
        decode = partial(self._tokenizer.decode, skip_special_tokens=False)
        known = lambda tokens: decode([token for token in tokens if self._tokenizer.has_token(token)])
        return ThinkingMatcher(plain, known, self._tokenizer.backend.token_to_id(OPENING), inside=spec.thinking == "open")

    def masks(self, matchers: Sequence[Matcher]) -> np.ndarray:
        """uint32 [len(matchers), V/32]: a bit for each token that may come next; none where the matcher has an error."""
        from llguidance.numpy import fill_next_token_bitmask_par

        masks = np.zeros((len(matchers), -(-self._vocab_size // 32)), np.int32)
        fill_next_token_bitmask_par(self._executor, [(m.matcher, i) for i, m in enumerate(matchers)], masks)
        for mask, matcher in zip(masks, matchers, strict=True):
            if matcher.error is not None:  # else its end would be told apart from a good one by nobody
                mask[:] = 0
            else:
                matcher.widen(mask.view(np.uint32))
        return masks.view(np.uint32)

    def _prepare(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._prepared is None:
                if self._tokenizer is None:
                    raise RequestError("structured_outputs needs a tokenizer, and this engine was made with skip_tokenizer_init")
                if not self._eos:
                    raise RequestError("structured_outputs needs a model with an end of sequence, and this one has none")
                try:
                    import llguidance
                except ImportError as error:
                    raise RequestError('structured_outputs needs llguidance: pip install "jaxllm[serve]"') from error
                added = self._tokenizer.backend.get_added_tokens_decoder().values()
                self._special = frozenset(token.content for token in added if token.special)
                backend = self._tokenizer.backend.to_str()
                self._prepared = llguidance.LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=self._eos)
                self._executor = llguidance.LLExecutor()
            return self._prepared

    def _compile(self, spec: StructuredOutputs) -> Matcher:
        made: Future[Matcher] = Future()

        def make() -> None:
            try:
                made.set_result(self._make(spec))
            except BaseException as error:
                made.set_exception(error)

        with _stack_size:
            before = threading.stack_size(_STACK)
            try:
                threading.Thread(target=make, name="jaxllm-grammar", daemon=True).start()
            finally:
                threading.stack_size(before)
        return made.result()

    def _make(self, spec: StructuredOutputs) -> Matcher:
        tokenizer = self._prepare()
        import llguidance

        try:
            grammar = spec.grammar_text(self._special)
        except ValueError as error:
            raise RequestError(f"structured_outputs: {_first_line(str(error))}") from None
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = Matcher(llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits))
        self.masks([matcher])  # finds out more, and leaves less to do at the first step
        if matcher.error is not None:
            raise RequestError(matcher.error)
        return matcher


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]
