"""What `jaxllm plan --topology cpu` says beside what the engine does: memory at its peak, and the time of a decode step.

    python benchmarks/plan_this_machine.py MODEL [--configurations 8x512:float32 8x512:bfloat16 32x512:float32] [--batched N]

Each configuration is SEQUENCESxTOKENS:DTYPE. The plan and the engine have a process each, in turn; the engine compiles everything (nothing
is kept from before) while its first requests run. Its memory is what no other process has and no file holds, looked at a hundred times a
second; its step is the median of decode steps in which every sequence is about as long as it may be. Prints a line of JSON each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

CONFIGURATIONS = ("8x512:float32", "8x512:bfloat16", "32x512:float32")


def run_engine(model: str, sequences: int, tokens: int, dtype: str, batched: int | None) -> dict[str, float]:
    from jaxllm.host_memory import PeakMemory

    with PeakMemory() as peak:
        from jaxllm import LLM, SamplingParams

        new, steps, read_at = min(24, tokens // 4), [], None
        options = dict(max_num_seqs=sequences, max_model_len=tokens, dtype=dtype, max_num_batched_tokens=batched)
        llm = LLM(model, **options, compilation_cache_dir="")

        def on_read(plan) -> None:
            nonlocal read_at
            now = time.perf_counter()
            if plan.num_decode == sequences and read_at is not None:
                steps.append(now - read_at)
            read_at = now

        def generate() -> None:
            prompts = [{"prompt_token_ids": [(7 * i + j) % 97 + 3 for j in range(tokens - new)]} for i in range(sequences)]
            llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True), use_tqdm=False)

        generate()  # while programs are still being compiled
        llm.engine.runner.finish_warm_up()
        llm.engine.on_read = on_read
        generate()  # the prompts are cached by now: all draw their tokens at the same time, whatever a step may hold
    return {"bytes": peak.bytes, "step_s": statistics.median(steps)}


def run_plan(model: str, sequences: int, tokens: int, dtype: str, batched: int | None) -> dict:
    flags = ["--max-num-seqs", sequences, "--max-model-len", tokens, "--dtype", dtype]
    flags += [] if batched is None else ["--max-num-batched-tokens", batched]
    return _json([sys.executable, "-m", "jaxllm.launch", "plan", "--model", model, "--topology", "cpu", "--json", *map(str, flags)])


def beside(model: str, configuration: str, batched: int | None = None) -> dict:
    """The plan's and the engine's figures of one configuration."""
    size, dtype = configuration.split(":")
    sequences, tokens = map(int, size.split("x"))
    plan = run_plan(model, sequences, tokens, dtype, batched)
    asked = ["--engine", str(sequences), str(tokens), dtype] + ([] if batched is None else ["--batched", str(batched)])
    engine = _json([sys.executable, __file__, model, *asked])
    held = plan["per_chip_bytes"]
    return {
        "configuration": configuration,
        "predicted_bytes": held["total"],
        "measured_bytes": engine["bytes"],
        "ratio": held["total"] / engine["bytes"],
        "predicted_step_s": plan["decode"]["bound_s"],
        "measured_step_s": engine["step_s"],
        "held": held,
        "gb_per_s": plan["settings"]["bandwidth"] / 1e9,
        "plan_s": plan["compile_s"],
    }


def _json(command: list[str]) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--configurations", nargs="+", default=CONFIGURATIONS)
    parser.add_argument("--batched", type=int, help="max_num_batched_tokens, if not the engine's choice")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.engine:
        print(json.dumps(run_engine(a.model, int(a.engine[0]), int(a.engine[1]), a.engine[2], a.batched)))
        return
    for configuration in a.configurations:
        print(json.dumps(beside(a.model, configuration, a.batched)), flush=True)


if __name__ == "__main__":
    main()
