"""The one tokenizer class: a `tokenizers.Tokenizer` with the special tokens and chat templates of a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from jaxllm.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes and decodes text; made by `load_tokenizer`.

    Args:
        backend: the vocabulary and its rules. The tokenizer owns it: truncation and padding are switched off.
        special_tokens: string of each named special token, keyed as in `SPECIAL_TOKEN_NAMES`.
        chat_templates: Jinja source by name; the one called "default" is used unless another is asked for.
        extra_eos_token_ids: further ids that end a generation, from generation_config.json.
        model_max_length: the longest input in tokens, where the files say so.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
        extra_eos_token_ids: Sequence[int] = (),
        model_max_length: int | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates or {})
        self.model_max_length = model_max_length

        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # Ids may have holes (a GGUF vocabulary that spells two ids alike); those ids stay None here and cannot be decoded.
        self.id_to_token: list[str | None] = [None] * self.vocab_size
        for token, token_id in vocabulary.items():
            self.id_to_token[token_id] = token

        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        first_eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*first_eos, *extra_eos_token_ids)))
        self.special_token_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.chat_templates.get("default")

    def has_token(self, token_id: int) -> bool:
        """Whether there is such a token; models may have more rows than their tokenizer has tokens."""
        return 0 <= token_id < self.vocab_size and self.id_to_token[token_id] is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled in the text become their ids; `add_special_tokens` adds BOS/EOS as the model wants.

        Raises RequestError if `text` is not a string or has a lone surrogate, which no UTF-8 text can hold.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_with_mask(
        self, text: str, spans: Sequence[tuple[int, int]], add_special_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of `text`, and 1 for those that overlap one of the half-open ranges of characters `spans`, 0 for others."""
        encoding = self._encoding(text, add_special_tokens)
        return encoding.ids, _mask(encoding.offsets, spans)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD. Spaces before punctuation are never "cleaned up".

        Raises RequestError if an id is not in the vocabulary.
        """
        return self.backend.decode(self.check_ids(ids), skip_special_tokens=skip_special_tokens)

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """`ids` as plain integers. Raises RequestError naming the first one that is not in the vocabulary."""
        checked = []
        for position, value in enumerate(ids):
            try:
                token_id = index(value)
            except TypeError:
                raise RequestError(f"Token ids must be integers, but the one at position {position} is {value!r}.") from None
            if not self.has_token(token_id):
                raise RequestError(
                    f"Token id {token_id} at position {position} is not in the vocabulary of {self.vocab_size} tokens: "
                    "use the ids of this model's own tokenizer."
                )
            checked.append(token_id)
        return checked

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any] | Callable] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_assistant_mask: bool = False,
        **template_kwargs: Any,
    ) -> list[int] | str | tuple[list[int], list[int]]:
        """Renders a conversation with the model's chat template, as transformers does.

        Args:
            messages: dicts with "role" and "content"; a message with "tool_calls" may leave "content" out.
            tools: JSON schemas, or functions with type hints and a Google docstring, which are turned into schemas.
            documents: for retrieval templates, dicts.
            chat_template: Jinja source, or the name of one of `chat_templates`; by default "tool_use" when there are tools and the
                model has one, else "default".
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: leave the last message open so that the model continues it; needs add_generation_prompt=False.
            tokenize: return ids rather than text.
            return_assistant_mask: return (ids, mask), where mask is 1 for tokens inside `{% generation %}` blocks and 0 elsewhere.
            template_kwargs: further variables for the template; they win over the special tokens.

        Raises RequestError for a malformed request, TokenizerError if there is no template or it refuses the messages.
        """
        from jaxllm.tokenizers import chat_template as chat

        if return_assistant_mask and not tokenize:
            raise RequestError("return_assistant_mask marks tokens, so it needs tokenize=True.")
        rendered = chat.render(
            self._choose_template(chat_template, tools),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            mark_generation=return_assistant_mask,
            variables={**self.special_tokens, **template_kwargs},
        )
        if not tokenize:
            return rendered.text
        if not return_assistant_mask:
            return self.encode(rendered.text, add_special_tokens=False)
        return self.encode_with_mask(rendered.text, rendered.generation_spans)

    def _choose_template(self, wanted: str | None, tools: object) -> str:
        if wanted is not None:
            return self.chat_templates.get(wanted, wanted)
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is not None:
            return self.chat_template
        names = f" It has only the templates {sorted(self.chat_templates)}, none called 'default'." if self.chat_templates else ""
        raise TokenizerError(
            f"This tokenizer has no chat template.{names} Pass chat_template=... (Jinja source or a name), put a chat_template.jinja "
            "beside tokenizer.json, or use a chat model rather than a base model."
        )

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise RequestError(f"The text to encode must be a string, but it is a {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text has the lone surrogate {text[error.start]!r} at position {error.start}: it is not valid Unicode. "
                "Decode the input with errors='replace'."
            ) from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens)


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for every token (start and end character, half open) that overlaps one of `spans`. Byte-level tokenizers leave spaces out of a
    token's offsets: the characters between two tokens' offsets belong to the second."""
    mask, before = [], 0
    for start, end in offsets:
        start, before = min(start, before), max(end, before)
        mask.append(int(any(start < span_end and end > span_start for span_start, span_end in spans)))
    return mask
