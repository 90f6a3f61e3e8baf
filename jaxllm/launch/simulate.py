"""`jaxllm simulate`: run the scheduler without a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Derive every plan of a recorded run again, and compare. Exit status 1 shows the first that differs.

    With --json: plans, calls, truncated (whether the record's last line was cut off).

    Example:

      jaxllm generate --model demo --prompt "Hello" --record run.jsonl
      jaxllm simulate --replay run.jsonl
    """

    replay: str
    "The record, made with --record FILE."


def run(config: Config) -> dict[str, Any]:
    from jaxllm.serving.replay import replay

    result = replay(config.replay)
    if result.truncated:
        print("the last line is cut off, as a crash leaves it: it is left out")
    print(f"{result.plans} plans, all identical")
    return {"plans": result.plans, "calls": result.calls, "truncated": result.truncated}
