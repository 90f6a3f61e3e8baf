"""A request's text as its tokens come, and the stop strings that end it."""

from collections.abc import Sequence

from jaxllm.serving.request import SamplingParams
from jaxllm.tokenizers import IncrementalDetokenizer, Tokenizer


class TextStream:
    """Turns tokens into text; `text` never shows the start of what may yet become a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_ids: Sequence[int]):
        self.text = ""
        self._stops, self._keeps_stop = params.stop, params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # tokens to come in whose text no stop string may end; it may begin there, as in vLLM
        self._held = ""  # decoded, not shown: it may be the beginning of a stop string
        self._detokenizer = None
        if tokenizer is not None:
            # Many models have more rows in their vocabulary than their tokenizer has tokens; those ids have no text.
            self._known = lambda ids: [i for i in ids if tokenizer.has_token(i)]
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=self._known(prompt_ids)
            )

    def add(self, token: int) -> str | None:
        """One more token. Returns the stop string that its text completed, which ends the text just before it."""
        if self._detokenizer is None:
            return None
        new = self._detokenizer.add(self._known([token]))
        self._unchecked -= 1
        return self._append(new, look=self._unchecked < 0)

    def finish(self) -> str | None:
        """No more tokens come: shows what was held back. Returns a stop string that the last characters completed."""
        if self._detokenizer is None:
            return None
        stop = self._append(self._detokenizer.finish())
        if stop is None:
            self.text, self._held = self.text + self._held, ""
        return stop

    def _append(self, new: str, look: bool = True) -> str | None:
        pending = self._held + new
        first = lambda stop: pending.find(stop, max(0, len(self._held) + 1 - len(stop)))  # one that ends in what is new
        found = [(place, stop) for stop in self._stops if (place := first(stop)) >= 0] if look else []
        if found:
            place, stop = min(found)
            end = place + len(stop) if self._keeps_stop else place
            self.text, self._held, self._stops = self.text + pending[:end], "", ()
            self._detokenizer = None
            return stop
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self.text, self._held = self.text + pending[: len(pending) - keep], pending[len(pending) - keep :]
        return None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` (not all of it) that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
