"""Makes training.npz: 20 steps of transformers (and PEFT) in float32 on a golden model, their losses and the weights that come out.

    python make_training_goldens.py [MODEL OUT]      (torch, transformers, peft)

With MODEL (a Hugging Face folder) and OUT (an .npz file): the same of another model, which train_parity.py asks for.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
STEPS, ROWS, LENGTH = 20, 4, 24
LORA = dict(r=4, lora_alpha=8, target_modules="all-linear")


def batches(vocab_size):
    """Tokens [STEPS, ROWS, LENGTH]; in each row the first tokens are a prompt, and the last are padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocab_size, (STEPS, ROWS, LENGTH))
    prompts, ends = rng.integers(1, 6, (STEPS, ROWS)), rng.integers(12, LENGTH + 1, (STEPS, ROWS))
    return tokens, prompts, ends


def train(net, parameters, tokens, prompts, ends, learning_rate):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    place, losses, norms = torch.arange(LENGTH), [], []
    for step in range(STEPS):
        ids = torch.tensor(tokens[step])
        inside = place < torch.tensor(ends[step])[:, None]
        labels = torch.where((place >= torch.tensor(prompts[step])[:, None]) & inside, ids, -100)
        loss = net(input_ids=ids, attention_mask=inside.long(), labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (STEPS - step) / STEPS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def main(model=HERE / "models" / "llama_gqa", out=HERE / "training.npz", learning_rate=1e-3, save=np.savez_compressed):
    torch.manual_seed(0)
    result = {"learning_rate": learning_rate}
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    result |= dict(zip(("tokens", "prompts", "ends"), batches(net.config.vocab_size), strict=True))
    data = [result[name] for name in ("tokens", "prompts", "ends")]
    result["full_losses"], result["full_norms"] = train(net, list(net.parameters()), *data, learning_rate)
    result |= {f"full:{name}": p.detach().numpy() for name, p in net.named_parameters()}
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    net = get_peft_model(net, LoraConfig(**LORA))
    adapter = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in adapter.items():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    result |= {f"before:{name.replace('.default', '')}": p.detach().clone().numpy() for name, p in adapter.items()}
    result["lora_losses"], result["lora_norms"] = train(net, list(adapter.values()), *data, learning_rate)
    result |= {f"after:{name.replace('.default', '')}": p.detach().numpy() for name, p in adapter.items()}
    save(out, **result)
    print(out, result["full_losses"][0], result["full_losses"][-1], result["lora_losses"][-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), Path(sys.argv[2]), 1e-4, np.savez)
    else:
        main()
