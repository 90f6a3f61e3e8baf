"""`jaxllm bench train`: optimiser steps on random tokens."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from jaxllm.errors import ConfigError
from jaxllm.launch.bench.common import peak_rss_bytes
from jaxllm.launch.command import Command


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Tokens a second of fine-tuning: the trainer's own step, with AdamW, on rows of random tokens that all count.

    Example:

      jaxllm bench train --model demo --mode lora --batch 4 --seq-len 256 --json
    """

    model: str
    "A folder, a .gguf file, a hub name (owner/name), or `demo`."
    mode: Literal["full", "lora"] = "full"
    "All parameters, or LoRA of --lora-rank on every linear layer."
    batch: int = 4
    "Rows in a step."
    seq_len: int = 256
    "Tokens in a row."
    precision: Literal["float32", "bfloat16_mixed", "bfloat16"] = "float32"
    "As in a training configuration."
    remat: Literal["none", "full", "dots", "dots_with_no_batch_dims"] = "none"
    "What the backward pass computes anew."
    lora_rank: int = 16
    "Of --mode lora."
    repeats: int = 5
    "Steps that count, after one that does not; figures are their medians."

    def __post_init__(self) -> None:
        self.check_counts("batch", "seq_len", "lora_rank", "repeats")


def run(config: Config) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx

    from jaxllm.adapters import LoraConfig
    from jaxllm.checkpoints import open_checkpoint, resolve_model
    from jaxllm.checkpoints.load import load_model
    from jaxllm.models import config_from_hf
    from jaxllm.sharding import ShardingRules, make_mesh
    from jaxllm.training import TrainConfig
    from jaxllm.training.data import DataConfig
    from jaxllm.training.metrics import training_flops
    from jaxllm.training.model import prepared, stored_dtype
    from jaxllm.training.program import make_program
    from jaxllm.training.step import init_state, place_batch

    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear") if config.mode == "lora" else None
    settings = TrainConfig(
        model=config.model,
        output_dir="unused",  # nothing is written, and no data read
        data=DataConfig(path=("unused",)),
        lora=lora,
        batch_size=config.batch,
        max_length=config.seq_len,
        precision=config.precision,
        remat=config.remat,
    )
    source = open_checkpoint(resolve_model(config.model))
    model_config = config_from_hf(source.config)
    if config.seq_len > model_config.max_positions:
        raise ConfigError(f"seq_len={config.seq_len} exceeds the {model_config.max_positions} positions of {config.model}")
    mesh, rules = make_mesh(), ShardingRules()
    model = load_model(source, dtype=stored_dtype(settings), mesh=mesh, rules=rules, scan_layers=True)
    decoder = prepared(nnx.merge(model.graph, model.params), settings)
    del model
    program, trainable, frozen = make_program(settings, decoder, mesh, rules, total_steps=1000)
    state = init_state(trainable, program.optimizer, program.settings, seed=0)
    del decoder, trainable
    step = program.train_step(state)

    rng, shape, seconds, losses = np.random.default_rng(0), (1, config.batch, config.seq_len), [], []
    low, high = (100, 40_000) if model_config.vocab_size > 40_000 else (0, model_config.vocab_size)
    for i in range(config.repeats + 1):
        tokens = rng.integers(low, high, shape, np.int32)
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=-1),
            "weights": np.ones(shape, np.float32),
            "segment_ids": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), shape),
        }
        start = time.perf_counter()
        state, metrics = step(state, frozen, place_batch(batch, mesh, rules))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
        print(f"{'compiled and ran' if i == 0 else f'step {i}'}: {seconds[-1]:.2f} s, loss {losses[-1]:.3f}", file=sys.stderr)
    step_s, tokens = median(seconds[1:]), config.batch * config.seq_len
    flops = training_flops(model_config, config.batch * config.seq_len**2, tokens, frozen=lora is not None)
    print(f"{tokens / step_s:.1f} tokens/s, {step_s:.3f} s a step, {flops / step_s / 1e9:.0f} GFLOP/s")
    return {
        "tokens_per_s": round(tokens / step_s, 1),
        "step_s": round(step_s, 4),
        "first_step_s": round(seconds[0], 2),
        "flops_per_s": round(flops / step_s),
        "peak_rss_bytes": peak_rss_bytes(),
        "mode": config.mode,
        "batch": config.batch,
        "seq_len": config.seq_len,
        "precision": config.precision,
        "model": config.model,
    }
