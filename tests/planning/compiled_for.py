"""`python compiled_for.py TOPOLOGY`: what `test_guards.py` looks at, compiled for it and told as JSON. A process of its own, for the
TPU's compiler is to find a machine without virtual devices."""

import json
import sys
from dataclasses import asdict, replace

from jaxllm.launch.plan import read_model_config
from jaxllm.models import config_from_hf
from jaxllm.planning import find_topology, plan_serving
from jaxllm.planning.kernels import KernelCase, compile_kernels

# Every path of tpu.py, and every value of each feature that `jaxllm kernels` lists.
ALL = {"window": 1000, "softcap": 30.0, "sinks": True}
KERNELS = [
    KernelCase(decode_only=True),
    KernelCase(heads=4, kv_heads=4, page_size=128, window=1000, decode_only=True),
    KernelCase(heads=71, kv_heads=1, head_dim=80, page_size=256, softcap=30.0, decode_only=True),
    KernelCase(heads=9, kv_heads=3, head_dim=96, sinks=True, decode_only=True),
    KernelCase(heads=8, kv_heads=1, head_dim=256, page_size=32, dtype="float32", decode_only=True),
    KernelCase(head_dim=64, kv_dtype="int8", **ALL, decode_only=True),
    KernelCase(heads=16, kv_heads=1, head_dim=64, page_size=16, **ALL),
    KernelCase(heads=8, kv_heads=1, page_size=16, dtype="float32", window=1000),
    KernelCase(heads=8, kv_heads=1, page_size=32, kv_dtype="float8_e4m3fn"),
]

# As published, but for the vocabularies of the small ones: with their sizes grows the time that the sampler takes to compile.
SMALL = dict(vocab_size=4096, max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True)
QWEN2_0_5B = dict(
    SMALL, model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, rope_theta=1e6, hidden_act="silu",
)  # fmt: skip
GEMMA2_2B = dict(
    SMALL, model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=512, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip


def steps(topology):
    """Name -> a plan: a model with many heads a chip, one with heads of 64 and tied embeddings, one with windows and soft caps."""
    on = lambda config, tensor, **sizes: asdict(
        plan_serving(config, replace(topology, devices=topology.devices[:tensor]), tensor=tensor, **sizes)
    )
    small = dict(max_num_seqs=8, max_model_len=4096, max_num_batched_tokens=64)
    llama = read_model_config("configs/models/llama-3-8b.yaml")
    return {
        "llama-3-8b": on(llama, len(topology.devices), max_num_seqs=64, max_model_len=2048),
        "qwen2-0.5b": on(config_from_hf(QWEN2_0_5B), 2, **small),
        "gemma2-2b": on(config_from_hf(GEMMA2_2B), 4, **small),
    }


if __name__ == "__main__":
    found = find_topology(sys.argv[1])
    kernels = [asdict(report) for report in compile_kernels(found, KERNELS, threads=1)]
    print(json.dumps({"kernels": kernels, "steps": steps(found)}))
