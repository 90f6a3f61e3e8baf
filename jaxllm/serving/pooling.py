"""Embeddings: hidden states of a prompt made into one vector, instead of a continuation.

A request that pools is one that draws a single token, which nobody sees. The rows of its prompt are added up on the device in
blocks of a step, as prompt log-probabilities are computed, so that prompts may come in chunks and the set of programs stays closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.errors import RequestError
from jaxllm.serving.request import Completion, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import StepPlan

PROMPT_BLOCK = 64  # rows of a step that are read beside what is drawn, at a time
POOLINGS = ("last", "mean")


@dataclass
class EmbeddingOutput:
    """`embedding`: as long as the model's last hidden states are wide."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """What a prompt was made into, under vLLM's names."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


class PoolRows(NamedTuple):
    """`count` of a step's rows, from `first_row` on, that go into a sequence's vector."""

    sequence: int
    first_row: int
    count: int

    def weights(self) -> np.ndarray:
        """float32 [PROMPT_BLOCK]: 1 for each of the rows."""
        return (np.arange(PROMPT_BLOCK) < self.count).astype(np.float32)


def embedding_params() -> SamplingParams:
    """Of a request that pools."""
    return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def check_pooling(pooling: str | None, params: SamplingParams) -> None:
    """Raises RequestError."""
    if pooling is None:
        return
    if pooling not in POOLINGS:
        raise RequestError(f"pooling must be {' or '.join(POOLINGS)}, not {pooling!r:.100}")
    if params.n != 1 or params.use_beam_search or params.max_tokens != 1 or params.structured_outputs is not None:
        raise RequestError("pooling is for requests of one token (max_tokens=1) without n, beams or structured_outputs")


def pool_rows(plan: StepPlan, completions: list[Completion]) -> list[PoolRows]:
    """The rows of a step that are pooled, in blocks; each row of a prompt once, though a preempted one is computed again."""
    blocks, row = [], 0
    for s, completion in zip(plan.scheduled, completions, strict=True):
        request, end = completion.request, s.start + s.count
        if request.pooling is not None:
            length = len(request.prompt_token_ids)
            start = max(s.start, request.pooled if request.pooling == "mean" else length - 1)
            end = min(end, length)
            for at in range(start, end, PROMPT_BLOCK):
                blocks.append(PoolRows(s.sequence.id, row + at - s.start, min(PROMPT_BLOCK, end - at)))
            request.pooled = max(request.pooled, end)
        row += s.count
    return blocks


def add_rows(request: Request, total: np.ndarray) -> None:
    """One more block's sum [D]."""
    request.hidden_sum = total.astype(np.float32) if request.hidden_sum is None else request.hidden_sum + total


def embedding(request: Request) -> np.ndarray:
    """float32 [D] of length 1, of a request whose prompt was computed."""
    pooled = request.hidden_sum / (len(request.prompt_token_ids) if request.pooling == "mean" else 1)
    return pooled / max(float(np.linalg.norm(pooled)), 1e-12)


def as_embedding(output: RequestOutput) -> EmbeddingRequestOutput:
    """Raises RequestError where the model gave no numbers."""
    if output.embedding is None or not np.isfinite(output.embedding).all():
        raise RequestError("the hidden states of the prompt have a NaN or an infinity: there is no embedding")
    vector = EmbeddingOutput(output.embedding.tolist())
    return EmbeddingRequestOutput(output.request_id, vector, output.prompt_token_ids, output.num_cached_tokens)
