"""What an engine tells those who use it from elsewhere: another thread, or another process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxllm.errors import JaxLLMError
from jaxllm.serving.request import RequestOutput

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine


class EngineDeadError(JaxLLMError, RuntimeError):
    """The engine has ended, by `shutdown` or by an error, which this one tells; no request can be served."""


def fail(asked: Future, error: BaseException) -> None:
    """Unless whoever asked has been cancelled."""
    if asked.set_running_or_notify_cancel():
        asked.set_exception(error)


@dataclass(frozen=True)
class EngineFacts:
    """What stays as it is while an engine lives. `embedding_dim`: length of a pooled prompt's vector."""

    max_model_len: int
    max_num_seqs: int
    embedding_dim: int


@dataclass(frozen=True)
class HostTierFigures:
    pages: int
    used: int
    saved: int
    fetched: int


@dataclass(frozen=True)
class EngineFigures:
    """An engine at one moment, and sums over its steps so far. `requests`: those that are not finished; `pages`: that can be used."""

    requests: int
    running: int
    waiting: int
    pages: int
    free_pages: int
    preemptions: int
    steps: int
    host_s: float
    compiles_after_warmup: int
    host_tier: HostTierFigures | None


@dataclass(frozen=True)
class News:
    """Of one turn of the engine: outputs by the numbers that `add` was given, and the tokens of each step that was started."""

    outputs: list[tuple[int, RequestOutput]]
    step_tokens: list[int]


@dataclass(frozen=True)
class Listener:
    """Whom an engine tells, on a thread of its own: `news` after every turn, and `end` when it can serve no more, or not before it has
    been started again."""

    news: Callable[[News], None]
    end: Callable[[EngineDeadError], None]


def facts_of(engine: Engine) -> EngineFacts:
    limits = engine.limits
    return EngineFacts(limits.max_model_len, limits.max_num_seqs, engine.runner.model.config.embedding_dim)


def figures_of(engine: Engine) -> EngineFigures:
    scheduler, pool, stats = engine.scheduler, engine.pool, engine.stats
    host = engine.runner.host_pages
    return EngineFigures(
        requests=engine.num_requests,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        pages=pool.capacity,
        free_pages=pool.num_free,
        preemptions=scheduler.num_preemptions,
        steps=stats.steps,
        host_s=stats.host_s,
        compiles_after_warmup=engine.runner.stats.compiles_after_warmup,
        host_tier=None if host is None else HostTierFigures(pool.host_pages, len(pool.host), host.stats.saved, host.stats.fetched),
    )
