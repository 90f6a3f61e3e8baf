"""Twenty steps of a real model, all of it and LoRA, in float32: transformers and PEFT take them, then we do.

    python tests/goldens/train_parity.py MODEL HF_PYTHON     # a Hugging Face folder; the Python that has torch, transformers, peft

Prints a line of JSON for each of `full` and `lora`: see `full_and_lora` of tests/training/parity.py. Fails where a loss is more than 1e-4
apart, or a weight's tensor more than 1e-3 of its norm.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def main(model: str, hf_python: str) -> None:
    sys.path.insert(0, str(HERE.parent / "training"))
    from parity import full_and_lora

    with tempfile.TemporaryDirectory() as folder:
        golden = Path(folder) / "golden.npz"
        subprocess.run([hf_python, HERE / "make_training_goldens.py", model, golden], check=True, stdout=sys.stderr)
        with np.load(golden) as data:
            found = full_and_lora(Path(model), dict(data))
    for mode, apart in found.items():
        print(json.dumps({"mode": mode, **apart}))
    sys.exit(any(apart["loss"] > 1e-4 or apart["weights"] > 1e-3 for apart in found.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
