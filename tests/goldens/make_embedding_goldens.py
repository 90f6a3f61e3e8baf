"""Write tests/goldens/embeddings.npz: transformers' last hidden states of the golden models, pooled.

    HF_PYTHON tests/goldens/make_embedding_goldens.py

For each case, and each of its golden prompts i: `CASE/last_i`, the final (normed) hidden state of the last token, and `CASE/mean_i`, the
mean over the tokens, each divided by its length (float32, eager attention, CPU).
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

CASES = ["gemma2", "gpt2", "llama_gqa", "opt_postnorm_proj", "qwen3"]
HERE = Path(__file__).parent


def main() -> None:
    arrays = {}
    for case in CASES:
        folder = HERE / "models" / case
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with np.load(folder / "golden.npz") as golden, torch.no_grad():
            for i in range(3):
                hidden = model(torch.tensor(golden[f"prompt_{i}"])[None].long()).last_hidden_state[0]
                for name, pooled in (("last", hidden[-1]), ("mean", hidden.mean(0))):
                    arrays[f"{case}/{name}_{i}"] = torch.nn.functional.normalize(pooled, dim=0).numpy()
    np.savez_compressed(HERE / "embeddings.npz", **arrays)


if __name__ == "__main__":
    main()
