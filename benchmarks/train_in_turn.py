"""Fine-tuning steps of jaxllm and of Hugging Face with PEFT, the same work on one machine in turn, a process at a time.

    python benchmarks/train_in_turn.py MODEL --hf PATH/TO/PYTHON [--rounds 5] [--dtype bfloat16] [--precision bfloat16_mixed]

AdamW on rows of random tokens that all count; `full`, and LoRA r16 on every linear layer. A round is a process of each, whose figure is the
median of `--steps` steps after one that does not count. Prints a line of JSON a run, and at the end the medians and their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

MODES = ("full", "lora")


def hugging_face(model: str, mode: str, dtype: str, batch: int, seq_len: int, steps: int) -> None:
    """Runs in the peer's own environment."""
    import os

    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    if mode == "lora":
        net = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    rng, seconds = np.random.default_rng(0), []
    for _ in range(steps + 1):
        ids = torch.tensor(rng.integers(100, 40000, (batch, seq_len)))
        start = time.perf_counter()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds[1:])
    print(json.dumps({"tokens_per_s": round(batch * seq_len / step_s, 1), "step_s": round(step_s, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--hf", help="the Python that has torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="Hugging Face's")
    parser.add_argument("--precision", default="float32", help="jaxllm's: float32, bfloat16_mixed, bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--run-hf", choices=MODES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run_hf:
        return hugging_face(a.model, a.run_hf, a.dtype, a.batch, a.seq_len, a.steps)
    if not a.hf:
        parser.error("--hf PATH/TO/PYTHON is needed")
    size = ["--batch", str(a.batch), "--seq-len", str(a.seq_len)]
    commands = {
        "jaxllm": lambda mode: [
            *(sys.executable, "-m", "jaxllm.launch", "bench", "train", "--model", a.model, "--mode", mode, *size),
            *("--precision", a.precision, "--repeats", str(a.steps), "--json"),
        ],
        "hf": lambda mode: [a.hf, __file__, a.model, "--run-hf", mode, "--dtype", a.dtype, "--steps", str(a.steps), *size],
    }
    figures: dict[tuple[str, str], list[float]] = {}
    for turn in range(a.rounds):
        for mode in MODES:
            for system in sorted(commands, reverse=turn % 2 == 1):
                done = subprocess.run(commands[system](mode), check=True, capture_output=True, text=True)
                result = json.loads(done.stdout.splitlines()[-1])
                figures.setdefault((system, mode), []).append(result["tokens_per_s"])
                print(json.dumps({"round": turn, "system": system, "mode": mode, **result}), flush=True)
    medians = {key: statistics.median(values) for key, values in figures.items()}
    for mode in MODES:
        ours, theirs = medians["jaxllm", mode], medians["hf", mode]
        print(json.dumps({"mode": mode, "jaxllm": ours, "hf": theirs, "ratio": round(ours / theirs, 2), "rounds": a.rounds}))


if __name__ == "__main__":
    main()
