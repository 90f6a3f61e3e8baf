"""Adapters that PEFT makes on the golden models, and the logits that it computes with them.

    HF_PYTHON tests/goldens/make_adapter_goldens.py [NAME ...]

Each is small and random, none of its weights zero. Made with PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU, float32).
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LM = {"task_type": "CAUSAL_LM"}
ALL = {"target_modules": "all-linear"}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
CASES = {  # name: (golden model, configuration)
    "lora_llama": ("llama_gqa", LoraConfig(r=4, lora_alpha=8, **ALL, **LM)),
    "lora_qwen3": ("qwen3", LoraConfig(r=2, lora_alpha=3, target_modules=r".*layers\.[12]\.(mlp\.\w+_proj|self_attn\.[qo]_proj)", **LM)),
    "lora_gemma3": ("gemma3_text", LoraConfig(r=2, lora_alpha=8, **ALL, **LM)),
    "lora_gemma3_conditional": (
        "gemma3_conditional",
        LoraConfig(r=2, target_modules=r".*language_model\..*\.(q_proj|down_proj)", **LM),
    ),
    "lora_gpt2": ("gpt2", LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], **LM)),
    "lora_phi3": ("phi3", LoraConfig(r=2, lora_alpha=6, **ALL, **LM)),
    "lora_opt": ("opt_postnorm_proj", LoraConfig(r=2, lora_alpha=6, **ALL, **LM)),
    "lora_layers_patterns": (
        "llama_gqa",
        LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "lm_head"], rank_pattern={"layers.1.self_attn.q_proj": 4},
            alpha_pattern={"down_proj": 9}, exclude_modules=["layers.2.mlp.down_proj"], **LM,
        ),
    ),
    "lora_layers_to_transform": ("llama_mqa_bias", LoraConfig(r=2, layers_to_transform=[0, 2], use_rslora=True, **ATTENTION, **LM)),
    "lora_save_modules": ("llama_gqa", LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head", "post_attention_layernorm"], **ATTENTION, **LM)),  # noqa: E501
    "dora_llama": ("llama_mqa_bias", LoraConfig(r=2, use_dora=True, **ALL, **LM)),
    "dora_layers": ("qwen3", LoraConfig(r=2, use_dora=True, layers_to_transform=[1], **ATTENTION, **LM)),
    "dora_gpt2": ("gpt2", LoraConfig(r=2, use_dora=True, target_modules=["c_attn", "c_fc"], **LM)),
    "dora_phi3": ("phi3", LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules=["qkv_proj", "down_proj"], **LM)),
    "ia3_llama": ("llama_mqa_bias", IA3Config(**LM)),
    "ia3_gpt2": ("gpt2", IA3Config(**LM)),
    "ia3_phi3": ("phi3", IA3Config(target_modules=["qkv_proj", "gate_up_proj"], feedforward_modules=["gate_up_proj"], **LM)),
    "prompt_llama": ("llama_gqa", PromptTuningConfig(num_virtual_tokens=3, **LM)),
    "prompt_gpt2": ("gpt2", PromptTuningConfig(num_virtual_tokens=3, **LM)),
    "prefix_llama": ("llama_gqa", PrefixTuningConfig(num_virtual_tokens=3, **LM)),
    "prefix_qwen3": ("qwen3", PrefixTuningConfig(num_virtual_tokens=3, **LM)),
    "prefix_gpt2": ("gpt2", PrefixTuningConfig(num_virtual_tokens=3, **LM)),
}  # fmt: skip


def load(case: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(HERE / "models" / case, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return model(input_ids=torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()


def tokens_of(case: str) -> np.ndarray:
    with np.load(HERE / "models" / case / "golden.npz") as data:
        return data["prompt_1"]


def make(name: str) -> None:
    case, config = CASES[name]
    torch.manual_seed(1)
    model = get_peft_model(load(case), config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_" in key or "ia3" in key else 0.1
                parameter.add_(scale * torch.randn_like(parameter))
    folder = HERE / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = case
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tokens = tokens_of(case)
    with_adapter = logits(model, tokens)[-len(tokens) :]
    change = np.abs(with_adapter - logits(load(case), tokens)).max()
    assert change > 0.05, f"{name}: the adapter changes the logits by only {change}"
    np.savez_compressed(folder / "golden.npz", base=np.array(case), tokens=tokens, logits=with_adapter.astype(np.float32))
    print(name, f"changes logits by {change:.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or CASES:
        make(each)
