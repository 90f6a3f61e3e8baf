"""Whether what is trained here loads in transformers and PEFT with the same logits, and comes back the same from PEFT's own files.

    python tests/goldens/peft_round_trip.py train OUT         # jaxllm: trains one of each kind on a tiny llama, into OUT
    HF_PYTHON tests/goldens/peft_round_trip.py check OUT      # torch, transformers, peft: compares, and saves each again
    python tests/goldens/peft_round_trip.py back OUT          # jaxllm: loads what PEFT saved, and compares

The greatest difference of a logit is told of each; over 1e-4 is a failure.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ALL = {"target_modules": "all-linear"}
KINDS = {
    "lora": {"lora": {"r": 4, **ALL}},
    "rslora_patterns": {"lora": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}, **ALL}},
    "lora_lm_head": {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
    "lora_save_modules": {"lora": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}},
    "dora": {"lora": {"r": 4, "use_dora": True, **ALL}},
    "ia3": {"ia3": {}},
    "prompt": {"prompt_tuning": {"num_virtual_tokens": 4}},
    "prefix": {"prefix_tuning": {"num_virtual_tokens": 4}},
    "full": {},
    "reward_lora": {"objective": {"name": "reward"}, "lora": {"r": 4, **ALL}},
    "reward_full": {"objective": {"name": "reward"}},
}
TOKENS = np.random.default_rng(0).integers(3, 250, (3, 17))


def train(out: Path) -> None:
    sys.path.insert(0, str(HERE.parent))
    from tiny_models import write_llama

    from jaxllm.config import from_dict
    from jaxllm.training import TrainConfig, Trainer

    options = dict(num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0)
    base = out / "base" if (out / "base").exists() else write_llama(out / "base", tokenizer=True, **options)
    pair = {"prompt": "red ->", "chosen": " yes", "rejected": " no"}
    for name, records in (("pairs", [pair] * 8), ("sft", [{"prompt": "red ->", "completion": " yes yes"}] * 8)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, changes in KINDS.items():
        data = {"path": [str(out / ("pairs.jsonl" if "reward" in name else "sft.jsonl"))], "packing": False}
        settings = {"model": str(base), "output_dir": str(out / name), "data": data, "optimizer": {"learning_rate": 0.02}}
        settings |= {"batch_size": 4, "max_length": 32, "max_steps": 5, "export_dtype": "float32", "keep_last": 1}
        trainer = Trainer(from_dict(TrainConfig, settings | changes))
        print(name, trainer.train().path)
        np.save(out / name / "logits.npy", ours(trainer.model(), "reward" in name))


def ours(model, reward: bool) -> np.ndarray:
    """Logits [B, T, V], or scores [B]."""
    import jax.numpy as jnp

    from jaxllm.adapters import prepend_virtual_tokens
    from jaxllm.models.attention import dense_attend
    from jaxllm.training.backend import ONE_DEVICE
    from jaxllm.training.objectives import scores

    tokens, length = TOKENS.astype(np.int32), TOKENS.shape[1]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    if model.virtual is not None:
        batch = prepend_virtual_tokens(batch, model.config, model.virtual.count)
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    if reward:
        return np.asarray(scores(model, batch, ONE_DEVICE))
    attend = dense_attend(batch["positions"], batch["segment_ids"])
    return np.asarray(model.logits(model(batch["tokens"], batch["positions"], attend)[0]))[:, -length:]


def check(out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    failed = []
    for name, changes in KINDS.items():
        kind = AutoModelForSequenceClassification if "reward" in name else AutoModelForCausalLM
        options = {"num_labels": 1} if "reward" in name else {}
        adapted = bool(changes.keys() - {"objective"})
        folder = out / name / ("adapter" if adapted else "model")
        model = kind.from_pretrained(out / "base" if adapted else folder, dtype=torch.float32, attn_implementation="eager", **options)
        model = PeftModel.from_pretrained(model, folder) if adapted else model
        with torch.no_grad():
            theirs = model.eval()(input_ids=torch.tensor(TOKENS)).logits.numpy()
        told = np.load(out / name / "logits.npy")
        theirs = theirs[:, 0] if "reward" in name else theirs[:, -TOKENS.shape[1] :]
        report(name, told, theirs, failed)
        model.save_pretrained(out / name / "again")
    sys.exit(f"differ: {', '.join(failed)}" if failed else 0)


def back(out: Path) -> None:
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.adapters import load_adapter
    from jaxllm.checkpoints import open_checkpoint
    from jaxllm.checkpoints.load import load_model
    from jaxllm.sharding import ShardingRules, make_mesh
    from jaxllm.training.objectives import add_score, without_head

    failed = []
    for name, changes in KINDS.items():
        adapted = bool(changes.keys() - {"objective"})
        if not adapted and "reward" in name:
            continue  # a classifier is no language model: only its adapter has a way back
        source = open_checkpoint(out / "base" if adapted else out / name / "again")
        model = load_model(source, dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=True)
        decoder = nnx.merge(model.graph, model.params)
        if "reward" in name:
            decoder = add_score(without_head(decoder), pad_token_id=0, saved=True, rngs=nnx.Rngs(3))
        if adapted:
            decoder, _ = load_adapter(decoder, out / name / "again")
        report(name, np.load(out / name / "logits.npy"), ours(decoder, "reward" in name), failed)
    sys.exit(f"differ: {', '.join(failed)}" if failed else 0)


def report(name: str, told: np.ndarray, found: np.ndarray, failed: list[str]) -> None:
    apart = np.abs(told - found).max()
    print(f"{name:20} {apart:.2g} of {np.abs(told).max():.3g}", flush=True)
    if not apart <= 1e-4:
        failed.append(name)


if __name__ == "__main__":
    {"train": train, "check": check, "back": back}[sys.argv[1]](Path(sys.argv[2]))
