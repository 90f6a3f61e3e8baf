"""Write tests/goldens/beams.json: what transformers' beam search finds with the tiny models.

    HF_PYTHON tests/goldens/make_beam_goldens.py

For some cases, and each prompt of their golden.npz: the 4 best continuations of 12 tokens out of 4 beams, the best first, and the sums of
their tokens' log-probabilities. The end of sequence is ignored: how beams that have ended compete is where definitions differ
(transformers scores by the length of the output, vLLM by that of prompt and output; transformers keeps fewer of them); without it all
are of one length, and the definitions agree.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent
BEAMS, TOKENS = 4, 12


def main() -> None:
    golden = {}
    for case in ("gemma3_text_5to1", "llama_gqa", "mistral"):
        folder = FOLDER / "models" / case
        golden[case] = []
        for i in range(3):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            model.generation_config.eos_token_id = None
            with np.load(folder / "golden.npz") as data:
                prompt = torch.tensor(data[f"prompt_{i}"][None].astype(np.int64))
            found = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                num_beams=BEAMS,
                num_return_sequences=BEAMS,
                do_sample=False,
                max_new_tokens=TOKENS,
                length_penalty=0.0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            tokens = found.sequences[:, prompt.shape[1] :].tolist()
            assert all(len(t) == TOKENS for t in tokens)
            golden[case].append({"tokens": tokens, "scores": [round(s, 5) for s in found.sequences_scores.tolist()]})
    lines = [f"{json.dumps(case)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]" for case, rows in golden.items()]
    (FOLDER / "beams.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
