"""Tasks in self-instruct's form (Wang et al., arXiv 2212.10560), written as prompts and completions in Alpaca's, every seventh held out.

    python benchmarks/alpaca_data.py SEED_TASKS.jsonl FOLDER      # FOLDER/train.jsonl, FOLDER/eval.jsonl
"""

import json
import sys
from pathlib import Path

HEAD = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
WITH_INPUT = ", paired with an input that provides further context"


def record(task: dict) -> dict[str, str]:
    """Of a task's first instance."""
    instance = task["instances"][0]
    head = HEAD.format(WITH_INPUT if instance["input"] else "") + f"### Instruction:\n{task['instruction']}\n\n"
    given = f"### Input:\n{instance['input']}\n\n" if instance["input"] else ""
    return {"prompt": f"{head}{given}### Response:\n", "completion": instance["output"]}


def main(source: str, folder: str) -> None:
    records = [record(json.loads(line)) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    parts = {"train": [r for i, r in enumerate(records) if i % 7 != 3], "eval": records[3::7]}
    for name, some in parts.items():
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
        print(f"{name}.jsonl: {len(some)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
