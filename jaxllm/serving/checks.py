"""What a request must be for an engine to serve it, besides what `SamplingParams` checks by itself. All raise RequestError."""

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np

from jaxllm.config import unknown
from jaxllm.errors import RequestError
from jaxllm.serving.sampling_params import SamplingParams


def check_prompt(prompt_token_ids: Seq[int], params: SamplingParams, *, vocab_size: int, max_model_len: int) -> list[int]:
    """The prompt's tokens, cut to the last `truncate_prompt_tokens`."""
    ids = list(prompt_token_ids)
    if not ids:
        raise RequestError("the prompt has no tokens: give at least one")
    if params.truncate_prompt_tokens is not None:
        keep = params.truncate_prompt_tokens if params.truncate_prompt_tokens > 0 else max_model_len - 1  # -1: as many as there is room for
        ids = ids[-keep:]
    if len(ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, and max_model_len={max_model_len} leaves no room to answer: shorten it, "
            "or set truncate_prompt_tokens"
        )
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < vocab_size:
            raise RequestError(f"prompt_token_ids has {i!r}: token ids are whole numbers from 0 to {vocab_size - 1}")
    return [int(i) for i in ids]


def check_params(params: SamplingParams, *, vocab_size: int, max_logprobs: int, has_tokenizer: bool, processors: Collection[str]) -> None:
    """What the engine has must be enough for what the request asks."""
    named = {
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids or (),
        "logit_bias": [token for token, _ in params.logit_bias or ()],
    }
    for name, ids in named.items():
        if bad := [i for i in ids if i >= vocab_size]:
            raise RequestError(f"{name} has {bad[0]}: token ids are whole numbers from 0 to {vocab_size - 1}")
    if not has_tokenizer:
        for name, instead in (("stop", "use stop_token_ids"), ("bad_words", "use logit_bias")):
            if getattr(params, name):
                raise RequestError(f"{name} needs a tokenizer, and this engine was made with skip_tokenizer_init: {instead}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > max_logprobs:
            raise RequestError(f"{name}={getattr(params, name)} exceeds the engine's max_logprobs={max_logprobs}: ask for fewer")
    if params.logits_processor is not None and not processors:
        raise RequestError(f"logits_processor={params.logits_processor!r}, and this engine was made without any (`logits_processors`)")
    if params.logits_processor is not None and params.logits_processor not in processors:
        raise RequestError(f"logits_processor: {unknown(params.logits_processor, list(processors), 'processor')}")
