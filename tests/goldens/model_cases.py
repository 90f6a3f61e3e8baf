"""The tiny checkpoints of `make_model_goldens.py`: one `Case` for every peculiarity that a model family must get right.

Plain data: no torch and no transformers here. Sizes are as small as the peculiarity allows; constants (windows, soft caps,
rotary bases, epsilons) are chosen so that ignoring any of them changes the logits visibly.
"""

from dataclasses import dataclass, field
from typing import Any

# Longest sequence fed to a model is 40 (prompt) + 32 (continuation) = 72 tokens, so 96 positions are enough by default.
BASE: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=96, rms_norm_eps=1e-2, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
ROPE = dict(rope_type="default", rope_theta=10000.0)
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    name: the folder; model_type: as in config.json; about: the peculiarity in a line; config: overrides of `BASE` (or the whole
    configuration when `bare`); ablations: name -> config overrides that switch one peculiarity off (the generator asserts that each
    changes the logits); old_remove / old_add: what turns config.json into the spelling of real hub checkpoints (None: no such file);
    shard: `max_shard_size`; dtype: of the weights on disk; stateful_rope: rotary frequencies depend on the length so far, so decoding
    with a cache differs from recomputing everything at each step, and both continuations are recorded.
    """

    name: str
    model_type: str
    about: str
    config: dict[str, Any] = field(default_factory=dict)
    ablations: dict[str, dict[str, Any]] = field(default_factory=dict)
    old_remove: tuple[str, ...] = ()
    old_add: dict[str, Any] | None = None
    bare: bool = False
    shard: str | None = None
    dtype: str = "float32"
    stateful_rope: bool = False

    def full_config(self) -> dict[str, Any]:
        return dict(self.config) if self.bare else BASE | self.config


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": ROPE | changes}


NO_EPS = {"eps": {"rms_norm_eps": 1e-6}}
NO_SCALING = {"scaling off": rope()}
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, beta_fast=8.0, beta_slow=1.0, original_max_position_embeddings=64)
MSCALE = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, mscale=1.0, mscale_all_dim=0.5, truncate=False, original_max_position_embeddings=64
)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.2, 2.0, 4.0, 7.5])
GEMMA2 = dict(
    num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=24, sliding_window=8, attn_logit_softcapping=1.5, final_logit_softcapping=3.0,
    tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", rope_parameters=ROPE,
)  # fmt: skip
GEMMA3_ROPE = {SLIDING: dict(rope_type="default", rope_theta=50.0), FULL: dict(rope_type="default", rope_theta=2000.0)}
GEMMA3 = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=8, tie_word_embeddings=True, rope_parameters=GEMMA3_ROPE)
GEMMA3_LINEAR = {SLIDING: GEMMA3_ROPE[SLIDING], FULL: dict(rope_type="linear", rope_theta=2000.0, factor=8.0)}
FIVE_TO_ONE = [SLIDING] * 5 + [FULL, SLIDING]
OPT = dict(
    vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=96, dropout=0.0,
    activation_function="relu", bos_token_id=2, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
OLD = {"torch_dtype": "float32", "transformers_version": "4.45.0"}
NEW_KEYS = ("dtype", "rope_parameters")

CASES = [
    Case(
        "llama_gqa", "llama", "plain Llama: grouped queries, untied head; three or more shards with an index", rope(), NO_EPS, shard="50KB"
    ),
    Case(
        "llama_bf16",
        "llama",
        "llama_gqa with bfloat16 weights on disk; goldens from those weights upcast to float32",
        rope(),
        dtype="bfloat16",
    ),
    Case(
        "llama_mha_tied",
        "llama",
        "as many key heads as query heads; tied embeddings",
        {"num_key_value_heads": 4, "tie_word_embeddings": True} | rope(),
        NO_EPS,
    ),
    Case(
        "llama_mqa_bias",
        "llama",
        "one key head, attention and MLP biases, head_dim 16 != hidden / heads",
        {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "mlp_bias": True} | rope(),
    ),
    Case("llama_rope_linear", "llama", "rotary scaling 'linear', factor 4", rope(rope_type="linear", factor=4.0), NO_SCALING),
    Case(
        "llama_rope_dynamic",
        "llama",
        "rotary scaling 'dynamic' (NTK), active beyond 16 positions",
        {"max_position_embeddings": 16} | rope(rope_type="dynamic", factor=4.0),
        NO_SCALING,
        stateful_rope=True,
    ),
    Case(
        "llama_rope_llama3",
        "llama",
        "rotary scaling 'llama3' with high, middle and low frequencies",
        {"head_dim": 16, "rope_parameters": LLAMA3},
        {"scaling off": rope(rope_theta=100.0), "no middle": rope(**LLAMA3 | {"high_freq_factor": 1.0001})},
        NEW_KEYS,
        OLD | {"rope_theta": 100.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    Case(
        "llama_rope_yarn",
        "llama",
        "rotary scaling 'yarn', attention factor from `factor`",
        {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": YARN},
        {
            "scaling off": rope(rope_theta=100.0),
            "attention factor": rope(**YARN, attention_factor=1.0),
            "betas": rope(**YARN | {"beta_fast": 2.0}),
        },
        NEW_KEYS,
        OLD
        | {"rope_theta": 100.0, "rope_scaling": {k: v for k, v in YARN.items() if k not in ("rope_theta", "rope_type")} | {"type": "yarn"}},
    ),
    Case(
        "llama_rope_yarn_mscale",
        "llama",
        "rotary scaling 'yarn' with mscale, mscale_all_dim, truncate false and default betas",
        {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": MSCALE},
        {
            "truncate": rope(**MSCALE | {"truncate": True}),
            "mscale": rope(**{k: v for k, v in MSCALE.items() if not k.startswith("mscale")}),
        },
    ),
    Case(
        "mistral",
        "mistral",
        "window 8 on every layer, head_dim 16 explicit",
        {"sliding_window": 8, "head_dim": 16} | rope(),
        {"window": {"sliding_window": None}, "window+1": {"sliding_window": 9}},
    ),
    Case("mistral_nowindow", "mistral", "sliding_window null", {"sliding_window": None} | rope(rope_theta=1000.0), {"theta": rope()}),
    Case(
        "qwen2", "qwen2", "query/key/value biases without an output bias, tied", {"tie_word_embeddings": True} | rope(rope_theta=1000000.0)
    ),
    Case(
        "qwen2_window",
        "qwen2",
        "use_sliding_window with max_window_layers 1: the first layer is full, later ones have window 8",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1} | rope(),
        {"window": {"use_sliding_window": False, "layer_types": None}, "first layer": {"layer_types": [SLIDING] * 3}},
        (*NEW_KEYS, "layer_types"),
        OLD | {"rope_theta": 10000.0, "rope_scaling": None},
    ),
    Case("qwen3", "qwen3", "per-head query/key norm, head_dim 16 explicit", {"head_dim": 16} | rope(rope_theta=1000000.0), NO_EPS),
    Case(
        "gemma2",
        "gemma2",
        "soft caps on attention and logits, alternating window 8, four norms, query_pre_attn_scalar 24, tied",
        GEMMA2,
        {
            "attention cap": {"attn_logit_softcapping": None},
            "final cap": {"final_logit_softcapping": None},
            "window": {"layer_types": [FULL] * 4},
            "alternation": {"layer_types": [FULL, SLIDING] * 2},
            "query scale": {"query_pre_attn_scalar": 16},
            "activation": {"hidden_activation": "silu"},
        },
        (*NEW_KEYS, "layer_types"),
        OLD | {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    ),
    Case(
        "gemma3_text",
        "gemma3_text",
        "explicit layer_types, two rotary bases, query/key norm with offset 1, window 8",
        GEMMA3 | {"num_hidden_layers": 4, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
        {
            "window": {"sliding_window": 96},
            "global base": {"rope_parameters": GEMMA3_ROPE | {FULL: GEMMA3_ROPE[SLIDING]}},
            "local base": {"rope_parameters": GEMMA3_ROPE | {SLIDING: GEMMA3_ROPE[FULL]}},
            "query scale": {"query_pre_attn_scalar": 16},
        },
    ),
    Case(
        "gemma3_text_5to1",
        "gemma3_text",
        "seven layers, default five windowed to one full; linear rotary scaling on the full layer only",
        GEMMA3 | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_LINEAR},
        {"scaling": {"rope_parameters": GEMMA3_ROPE}, "pattern": {"layer_types": [SLIDING] * 4 + [FULL] + [SLIDING] * 2}},
        (*NEW_KEYS, "layer_types", "_sliding_window_pattern"),
        OLD
        | {
            "rope_theta": 2000.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
    ),
    Case(
        "gemma3_conditional",
        "gemma3",
        "multimodal Gemma 3 (tiny SigLIP inside); text-only goldens, weights under the language model's prefix",
        {
            "text_config": BASE | GEMMA3 | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_LINEAR},
            "vision_config": dict(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
            ),
            "mm_tokens_per_image": 4,
            "boi_token_index": 125,
            "eoi_token_index": 126,
            "image_token_index": 127,
        },
        bare=True,
    ),
    Case("phi3", "phi3", "fused qkv_proj and gate_up_proj, window 8", {"sliding_window": 8} | rope(), {"window": {"sliding_window": None}}),
    Case(
        "phi3_longrope",
        "phi3",
        "rotary scaling 'longrope': short factors up to 16 positions, long ones beyond",
        {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
        {
            "scaling off": rope(),
            "long factors": rope(**LONGROPE | {"long_factor": LONGROPE["short_factor"]}),
            "attention factor": {"rope_parameters": LONGROPE | {"attention_factor": 1.0}},
        },
        NEW_KEYS,
        OLD
        | {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]},
        },
        stateful_rope=True,
    ),
    Case(
        "phi3_partial_rotary",
        "phi3",
        "only the first half of each head is rotated (Phi-4-mini), tied",
        {"tie_word_embeddings": True} | rope(partial_rotary_factor=0.5),
        {"partial": rope(partial_rotary_factor=1.0)},
        NEW_KEYS,
        OLD | {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    Case(
        "gpt2",
        "gpt2",
        "Conv1D weights [in, out], fused c_attn, learned positions, LayerNorm, gelu_new, tied",
        dict(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=96, layer_norm_epsilon=1e-2, bos_token_id=2, eos_token_id=2),
        {"activation": {"activation_function": "gelu"}, "eps": {"layer_norm_epsilon": 1e-5}},
        bare=True,
    ),
    Case(
        "opt_prenorm",
        "opt",
        "learned positions offset by 2, relu, biases, norm before each block, tied",
        OPT,
        {"activation": {"activation_function": "gelu"}},
        bare=True,
    ),
    Case(
        "opt_postnorm_proj",
        "opt",
        "norm after each block and none at the end, embeddings of width 16 projected in and out (OPT-350m)",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {"norm position": {"do_layer_norm_before": True}},
        bare=True,
    ),
    Case(
        "smollm3",
        "smollm3",
        "no rotation on every third layer (no_rope_layers: 1 means rotated), tied",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 3, "tie_word_embeddings": True} | rope(rope_theta=2000000.0),
        {"rotate all": {"no_rope_layers": [1] * 4}, "off by one": {"no_rope_layers": [0, 1, 1, 0]}},
        (*NEW_KEYS, "layer_types", "no_rope_layers"),
        OLD | {"rope_theta": 2000000.0, "rope_scaling": None, "no_rope_layers": [1, 1, 0, 1]},
    ),
    Case("olmo2", "olmo2", "norms after attention and MLP only, query/key norm over all heads together", rope(rope_theta=500000.0), NO_EPS),
    Case(
        "falcon3",
        "llama",
        "Falcon 3: LlamaForCausalLM with head_dim explicit, one key head, rope_theta 1000042",
        {"head_dim": 16, "num_key_value_heads": 1} | rope(rope_theta=1000042.0),
        NO_SCALING,
    ),
]
