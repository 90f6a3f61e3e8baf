"""`jaxllm bench latency`: one request at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.launch.bench.common import BenchCommand, make_llm, measure


@dataclass(frozen=True, kw_only=True)
class Config(BenchCommand):
    """Time to the first token and between tokens, of one request (or --num-prompts together).

    Example:

      jaxllm bench latency --model demo --input-len 1024 --output-len 1 --json
    """

    num_prompts: int = 1
    "Requests, all there from the start."


def run(config: Config) -> dict[str, Any]:
    llm, startup = make_llm(config)
    result = measure(llm, config, startup)
    print(f"first token after {result['ttft_ms']:.1f} ms, then {result['tpot_ms']:.2f} ms a token")
    return result
