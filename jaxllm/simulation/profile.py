"""What a machine takes for a step, measured on the engine: a `CostModel` for the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.simulation.real import serve
from jaxllm.simulation.traces import Trace

if TYPE_CHECKING:
    from jaxllm.serving.engine import Engine
    from jaxllm.serving.scheduler import StepPlan


@dataclass(frozen=True)
class Step:
    """One that was measured. `shape`: of its program, as `CostModel.shapes` names it; `context`: the tokens that its sequences
    attend to; `pairs`: of tokens of a chunk with those before them."""

    shape: str
    context: int
    pairs: int
    seconds: float


def describe(plan: StepPlan, engine: Engine, seconds: float) -> Step:
    from jaxllm.serving.batch import pick_bucket

    n = len(plan.scheduled)
    bucket = pick_bucket(engine.runner.buckets, plan.num_tokens, n, plan.num_decode == n)
    context = sum(s.start + s.count for s in plan.scheduled)
    pairs = sum(s.count * (s.start + s.count // 2) for s in plan.scheduled if s.count > 1)
    return Step(f"decode {bucket.sequences}" if bucket.decode else f"mixed {bucket.tokens}", context, pairs, seconds)


def fit(steps: Sequence[Step]) -> dict[str, object]:
    """`CostModel`'s shapes, context_token_s and attend_pair_s: least squares, none below 0. Raises ConfigError if there are too few."""
    from scipy.optimize import nnls

    names = sorted({step.shape for step in steps})
    if len(steps) < 2 * len(names) + 2:
        raise ConfigError(f"{len(steps)} steps are too few to tell the times of {len(names)} shapes")
    rows = np.zeros((len(steps), len(names) + 2))
    for row, step in zip(rows, steps, strict=True):
        row[names.index(step.shape)] = 1
        row[-2:] = step.context, step.pairs
    seconds = np.array([step.seconds for step in steps])
    # By the size of each, as a second in a step of ten is what a millisecond is in one of ten; what something else held up is left out.
    scale, kept = 1 / seconds, np.ones(len(steps), bool)
    for _ in range(3):
        found, _ = nnls(rows[kept] * scale[kept, None], np.ones(kept.sum()))
        off = np.abs(rows @ found - seconds) / seconds
        kept = off <= max(0.1, 3 * float(np.median(off)))
        kept |= ~np.isin([step.shape for step in steps], [step.shape for step, k in zip(steps, kept, strict=True) if k])
    shapes = {name: float(max(t, 1e-6)) for name, t in zip(names, found, strict=False)}
    return {"shapes": shapes, "context_token_s": float(found[-2]), "attend_pair_s": float(found[-1])}


def measure(engine: Engine, *, repeats: int, longest: int) -> list[Step]:
    """Steps that bring up every shape at several contexts, `repeats` times after once that does not count."""
    steps: list[Step] = []
    serve(engine, _decoding(engine, longest, seed=0))  # what is done once
    for seed in range(1, repeats + 1):
        run = lambda trace: _run(engine, trace, steps)
        run(_decoding(engine, longest, seed))
        run(_decoding(engine, max(1, longest // 8), seed))
        taken = pause = float(np.median([step.seconds for step in steps]))
        for size in sorted({bucket.tokens for bucket in engine.runner.buckets if not bucket.decode}):
            new = run(_chunks(min(size, longest), 3 * pause + 2.5 * taken, seed))
            taken = max([taken, *(step.seconds for step in new)])
    return steps


def _run(engine: Engine, trace: Trace, steps: list[Step]) -> list[Step]:
    before = len(steps)
    serve(engine, trace, lambda plan, seconds: steps.append(describe(plan, engine, seconds)))
    engine.reset_prefix_cache()
    return steps[before:]


def _decoding(engine: Engine, longest: int, seed: int) -> Trace:
    """As many at once as run together, with prompts of all lengths, that end one after the other."""
    rng, n = np.random.default_rng(seed), engine.limits.max_num_seqs
    prompts = np.maximum(1, np.exp(rng.uniform(0, np.log(longest + 1), n))).astype(np.int64)
    return Trace(np.zeros(n), prompts, 8 * np.arange(1, n + 1) if n < 8 else np.linspace(8, 48, n).astype(np.int64))


def _chunks(size: int, pause: float, seed: int) -> Trace:
    """One that draws throughout, and prompts of little less than `size` that come one after the other, `pause` seconds apart."""
    n, rng = 6, np.random.default_rng(seed)
    prompts = np.maximum(2, size - 2 - rng.integers(0, max(1, size // 4), n))
    return Trace(pause * np.arange(n + 1), np.array([4, *prompts]), np.array([10 * n, *np.full(n, 3)]))
