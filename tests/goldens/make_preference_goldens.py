"""Makes preference.npz: what TRL's trainers compute as losses, and their gradients' norms, on fixed batches of a golden model.

    python make_preference_goldens.py      (trl, torch, transformers)

The reference's log-probabilities are given, as TRL takes them with precompute_ref_log_probs. ORPO's prompts are one token long:
TRL learns the prompt too, and of one token there is nothing to learn. Made with TRL 1.16.0, transformers 5.23.0, torch 2.13.0.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as Pairs
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference as Labels
from trl.trainer.reward_trainer import DataCollatorForPreference as Scores

HERE = Path(__file__).parent
MODEL, TOKENIZER = HERE / "models" / "llama_gqa", HERE / "tokenizers" / "byte_bpe"
ROWS = 4
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
UNUSED = {"pairs": [PAIR] * 2, "kto": [{"prompt": "a", "completion": "b", "label": bool(i)} for i in range(2)]}  # trainers want data


def trainer(kind, settings, model, data="pairs", **options):
    args = settings(tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = kind(model=model, args=args, train_dataset=Dataset.from_list(UNUSED[data]), processing_class=tokenizer)
    made.model.eval()
    made.precompute_ref_logps = True  # set after, for the data above is not to be computed with: its tokens are another model's
    return made


def causal():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")


def told(loss, model):
    loss.backward()
    return loss.item(), torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)).item()


def main():
    rng = np.random.default_rng(0)
    text = lambda low, high: rng.integers(3, 128, rng.integers(low, high)).tolist()
    pairs = [{"prompt_ids": text(2, 6), "chosen_ids": text(2, 9), "rejected_ids": text(2, 9)} for _ in range(ROWS)]
    short = [{**pair, "prompt_ids": pair["prompt_ids"][:1]} for pair in pairs]
    labels = np.array([True, False, False, True])
    reference = {name: rng.normal(-25, 5, ROWS).astype(np.float32) for name in ("chosen", "rejected")}
    out = {f"reference_{name}": value for name, value in reference.items()} | {"labels": labels}
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        out[name] = np.array([pair[name] + [0] * (8 - len(pair[name])) for pair in pairs])  # 0 is no token here

    batch = Pairs(pad_token_id=0)(pairs)
    batch |= {f"ref_{name}_logps": torch.tensor(reference[name]) for name in ("chosen", "rejected")}
    for kind in ("sigmoid", "hinge", "ipo"):
        made = trainer(DPOTrainer, DPOConfig, causal(), beta=0.3, loss_type=[kind])
        out[f"dpo_{kind}"] = told(made.compute_loss(made.model, dict(batch)), made.model)

    answers = [pair["chosen_ids" if good else "rejected_ids"] for pair, good in zip(pairs, labels, strict=True)]
    rows = [{"prompt_ids": p["prompt_ids"], "completion_ids": a, "label": bool(g)} for p, a, g in zip(pairs, answers, labels, strict=True)]
    rows = [row | {"KL_completion_ids": answers[i - 1]} for i, row in enumerate(rows)]  # KTOTrainer._prepare_dataset: the one before
    batch = Labels(pad_token_id=0)(rows)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, per_device_train_batch_size=2)
    made = trainer(KTOTrainer, KTOConfig, causal(), "kto", **options)
    with torch.no_grad():  # a divergence that is above zero, and does not drown the rest
        kl = made._compute_kl_logps(made.model, batch) - torch.tensor([3.0, -1.0, 4.0, 0.5])
    out["reference_kl"], batch["ref_logps"], batch["ref_KL_logps"] = kl.numpy(), torch.tensor(reference["chosen"]), kl
    out["kto"] = told(made.compute_loss(made.model, dict(batch)), made.model)
    out["kto_kl"] = made._metrics["eval"]["kl"][0]
    assert out["kto_kl"] > 0

    for name, kind, settings, examples in (
        ("orpo", ORPOTrainer, ORPOConfig, short),
        ("simpo", CPOTrainer, CPOConfig, pairs),
    ):
        more = {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0} if name == "simpo" else {}
        made = trainer(kind, settings, causal(), beta=0.3, **more)
        batch = {}
        for half in ("chosen", "rejected"):
            ids = [e["prompt_ids"] + e[f"{half}_ids"] for e in examples]
            length = max(map(len, ids))
            fill = lambda rows, value, length=length: torch.tensor([row + [value] * (length - len(row)) for row in rows])
            batch[f"{half}_input_ids"], batch[f"{half}_attention_mask"] = fill(ids, 0), fill([[1] * len(i) for i in ids], 0)
            batch[f"{half}_labels"] = fill([[-100] * len(e["prompt_ids"]) + e[f"{half}_ids"] for e in examples], -100)
        out[name] = told(made.get_batch_loss_metrics(made.model, batch)[0], made.model)

    torch.manual_seed(0)
    for coefficient in (None, 0.1):
        model = LlamaForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, 32)[None])
        made = trainer(RewardTrainer, RewardConfig, model, center_rewards_coefficient=coefficient)
        batch = Scores(pad_token_id=0)([{half: e["prompt_ids"] + e[half] for half in ("chosen_ids", "rejected_ids")} for e in pairs])
        model.config.pad_token_id = 0
        out["reward" if coefficient is None else "reward_centred"] = told(made.compute_loss(made.model, dict(batch)), made.model)
    np.savez_compressed(HERE / "preference.npz", **out)
    print({name: value for name, value in out.items() if np.ndim(value) < 2})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
