"""`jaxllm bench throughput`: many requests at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.launch.bench.common import BenchCommand, make_llm, measure


@dataclass(frozen=True, kw_only=True)
class Config(BenchCommand):
    """Tokens a second over a batch of requests that are all there from the start.

    Example:

      jaxllm bench throughput --model demo --num-prompts 32 --input-len 128 --output-len 128 --json
    """


def run(config: Config) -> dict[str, Any]:
    llm, startup = make_llm(config)
    result = measure(llm, config, startup)
    print(f"{result['output_tokens_per_s']:.1f} output tokens/s, {result['total_tokens_per_s']:.1f} with the prompts'")
    return result
