"""Models made up for tests: random weights, at once."""

import shutil
from pathlib import Path

import numpy as np
from golden_cases import FOLDER

from jaxllm.checkpoints.writer import write_safetensors
from jaxllm.tokenizers import load_tokenizer


def write_llama(folder: Path, *, tokenizer: bool = False, **changes) -> Path:
    """A llama of one layer, 32 wide, in the Hugging Face layout; `tokenizer`: with the golden one and its vocabulary."""
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    golden = FOLDER / "tokenizers" / "byte_bpe"
    if tokenizer:
        config["vocab_size"] = load_tokenizer(golden).vocab_size
    config |= changes
    d, f, hd = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": s for n, s in dict(q=(q, d), k=(kv, d), v=(kv, d), o=(d, q)).items()}
        shapes |= {f"{layer}mlp.{n}_proj.weight": s for n, s in dict(gate=(f, d), up=(f, d), down=(d, f)).items()}
        shapes |= {f"{layer}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    rng = np.random.default_rng(1)
    write_safetensors(folder, ((n, (rng.standard_normal(s) * 0.3).astype(np.float32)) for n, s in shapes.items()), config)
    if tokenizer:
        for file in golden.iterdir():
            shutil.copy(file, folder)
    return folder
