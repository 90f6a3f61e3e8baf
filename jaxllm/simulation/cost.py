"""How long a step takes, in place of a device."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.config import from_dict
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from jaxllm.serving.scheduler import StepPlan


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Seconds of a step: the longer of reading the weights (and whatever else each step takes) and computing its tokens, then
    reading the keys and values of all that its sequences attend to, and the host's part. An engine runs a step in the smallest of its
    shapes that has room for it: where those have been measured (`shapes`), they are in place of the first.

    Everything is in seconds, tokens and bytes.
    """

    step_s: float
    "A step of few tokens."
    token_s: float
    "Computing one token, where tokens are what counts."
    context_token_s: float = 0.0
    "Attending to one token of the KV cache."
    attend_pair_s: float = 0.0
    "Attention of one token of a prompt to one before it."
    sequence_s: float = 0.0
    "What each sequence of a step adds."
    kv_tokens: int
    "Tokens that the KV cache has room for."
    kv_token_bytes: int
    "Keys and values of one token."
    host_bandwidth: float = 20e9
    "Bytes a second between device and host memory."
    max_model_len: int = 2048
    "Tokens of the longest prompt and output together."
    shapes: dict[str, float] = field(default_factory=dict)
    "Seconds of a step by its shape, `decode SEQUENCES` (a token each) or `mixed TOKENS`, without what its tokens attend to."

    def __post_init__(self) -> None:
        for name in ("step_s", "token_s", "kv_tokens", "kv_token_bytes", "host_bandwidth", "max_model_len"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cost model: {name} must be above 0, got {getattr(self, name)}")
        for name in ("context_token_s", "attend_pair_s", "sequence_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cost model: {name} must be at least 0, got {getattr(self, name)}")
        for name, seconds in self.shapes.items():
            kind, _, size = name.partition(" ")
            if kind not in ("decode", "mixed") or not size.isdecimal() or not seconds > 0:
                raise ConfigError(f"cost model: shapes are `decode N` and `mixed N` with seconds above 0, got {name!r}: {seconds}")
        if len({name.split()[0] for name in self.shapes}) == 1:
            raise ConfigError("cost model: shapes must have steps of both kinds, `decode N` and `mixed N`")

    @cached_property
    def _sizes(self) -> dict[str, tuple[list[int], list[float]]]:
        """By kind: sizes in rising order, and their seconds."""
        known = {kind: sorted((int(n.split()[1]), t) for n, t in self.shapes.items() if n.startswith(kind)) for kind in ("decode", "mixed")}
        return {kind: tuple(map(list, zip(*pairs, strict=True))) for kind, pairs in known.items()}

    def _base(self, tokens: int, decode: bool) -> float:
        if not self.shapes:
            return max(self.step_s, tokens * self.token_s)
        sizes, seconds = self._sizes["decode" if decode else "mixed"]
        i = bisect_left(sizes, tokens)
        return seconds[i] if i < len(sizes) else seconds[-1] * tokens / sizes[-1]

    def seconds(self, plan: StepPlan) -> float:
        """Of a step."""
        context = pairs = 0
        for s in plan.scheduled:
            context += s.start + s.count
            if s.count > 1:
                pairs += s.count * (s.start + s.count // 2)
        n = len(plan.scheduled)
        return self._sum(plan.num_tokens, n, context, plan.num_decode == n) + pairs * self.attend_pair_s

    def repeated(self, plan: StepPlan) -> tuple[float, float]:
        """(seconds of the step after `plan`, and by how much each further one is longer), all being of one token a sequence."""
        n = len(plan.scheduled)
        context = sum(s.start for s in plan.scheduled) + 2 * n
        return self._sum(n, n, context, True), n * self.context_token_s

    def _sum(self, tokens: int, sequences: int, context: int, decode: bool) -> float:
        return self._base(tokens, decode) + context * self.context_token_s + sequences * self.sequence_s

    def prompt_s(self, tokens: int) -> float:
        """A prompt alone."""
        return self._base(tokens, False) + tokens * self.context_token_s + tokens * tokens / 2 * self.attend_pair_s


# OPT-13B: 26 GB of weights in 31 ms a step; 26 GFLOP a token at 60% of 312 TFLOP/s; 0.82 MB of keys and values a token at 1.5 TB/s.
# Llama 3 8B: 16 GB at 80% of 3.35 TB/s; 16 GFLOP at 50% of 989 TFLOP/s; 131 kB a token (8 heads of 128, 32 layers, 2 bytes).
MACHINES = {
    "opt-13b/a100": CostModel(
        step_s=31e-3,
        token_s=1.4e-4,
        context_token_s=5.4e-7,
        attend_pair_s=4.4e-9,
        kv_tokens=11_000,
        kv_token_bytes=819_200,
        host_bandwidth=20e9,
        max_model_len=2048,
    ),
    "llama-8b/h100": CostModel(
        step_s=6e-3,
        token_s=3.2e-5,
        context_token_s=4.9e-8,
        attend_pair_s=1.1e-9,
        kv_tokens=420_000,
        kv_token_bytes=131_072,
        host_bandwidth=50e9,
        max_model_len=131_072,
    ),
}


def cost_model(name: str) -> CostModel:
    """By its name in MACHINES, or from a JSON file of a measured profile (`CostModel`'s fields). Raises ConfigError."""
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".json"):
        raise ConfigError(f"there is no machine {name!r}: known are {', '.join(MACHINES)}, or a profile, FILE.json")
    try:
        return from_dict(CostModel, json.loads(Path(name).read_text(encoding="utf-8")), name)
    except OSError as error:
        raise ConfigError(f"cannot read the profile {name} ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the profile {name} is not JSON: {error}") from error
