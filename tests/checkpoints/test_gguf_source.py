"""GGUF files read as Hugging Face checkpoints: names, values, configuration."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.gguf_config import ARCHITECTURES
from jaxllm.errors import CheckpointError
from jaxllm.launch.plan import read_model_config
from jaxllm.models import config_from_hf


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_come_back_as_hugging_face_has_them(make_gguf, architecture):
    path, tensors = make_gguf(architecture)
    source = open_checkpoint(path)
    assert set(source.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert source.tensors[name] == (expected.shape, "float32")
        # Gemma's norms went through +1 and -1 in float32; everything else is the same bits.
        tolerance = 3e-7 if "gemma" in architecture and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(source.read(name), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_slice_of_a_tensor_is_that_slice_of_the_whole(make_gguf, architecture, data):
    path, tensors = make_gguf(architecture)
    source = open_checkpoint(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    index = tuple(data.draw(st.slices(size)) for size in tensors[name].shape)[: data.draw(st.integers(0, 2))]
    whole = source.read(name)
    np.testing.assert_array_equal(source.read(name, index), whole[index])


def test_config_of_llama(make_gguf):
    path, _ = make_gguf("llama", {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5})
    assert open_checkpoint(path).config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": 48,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": None,
    }


def test_a_plan_reads_it(make_gguf):
    path, _ = make_gguf("llama")
    assert read_model_config(str(path)) == read_model_config(str(path.parent)) == config_from_hf(open_checkpoint(path).config)


def test_an_output_matrix_unties_the_embedding(make_gguf):
    output = np.ones((48, 32), np.float32)
    source = open_checkpoint(make_gguf("llama", extra={"output.weight": output})[0])
    assert source.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(source.read("lm_head.weight"), output)


def test_llama3_rope_scaling_is_recognised_from_its_divisors(make_gguf):
    frequencies = 500000.0 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)
    divisors = []
    for wavelength in 2 * np.pi / frequencies:  # as in llama.cpp's converter
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    divisors = np.array(divisors, np.float32)
    path, _ = make_gguf("llama", {"rope.freq_base": 500000.0}, {"rope_freqs.weight": divisors})
    scaling = open_checkpoint(path).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    path, _ = make_gguf("llama", {"rope.freq_base": 500000.0}, {"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(CheckpointError, match="rope_freqs.weight"):
        open_checkpoint(path)


def test_phi3_long_rope_factors_and_partial_rotation(make_gguf):
    factors = {"rope_factors_long.weight": np.full(6, 2, np.float32), "rope_factors_short.weight": np.ones(6, np.float32)}
    config = open_checkpoint(make_gguf("phi3", {"rope.dimension_count": 12}, factors)[0]).config
    assert config["rope_scaling"] == {"rope_type": "longrope", "type": "longrope", "long_factor": [2.0] * 6, "short_factor": [1.0] * 6}
    assert (config["partial_rotary_factor"], config["original_max_position_embeddings"], config["sliding_window"]) == (0.75, 64, None)


def test_yarn_and_linear_scaling(make_gguf):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    scaling = open_checkpoint(make_gguf("qwen2", yarn)[0]).config["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    path, _ = make_gguf("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma2", 2, 16), ("gemma2", 46, 8), ("gemma3", 12, 16), ("gemma3", 62, 8)]
)
def test_gemma_knows_its_layers_and_its_query_scale(make_gguf, architecture, layers, scalar):
    config = open_checkpoint(make_gguf(architecture, {"block_count": layers})[0]).config
    period = 2 if architecture == "gemma2" else 6
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert full == list(range(period - 1, layers, period)) and len(config["layer_types"]) == layers
    assert config["query_pre_attn_scalar"] == scalar
    assert config["hidden_act"] == "gelu_pytorch_tanh"


def test_mistral_with_a_window_is_mistral_and_smollm3_skips_every_fourth_rotation(make_gguf):
    config = open_checkpoint(make_gguf("llama", {"attention.sliding_window": 64})[0]).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)
    assert open_checkpoint(make_gguf("smollm3", {"block_count": 5})[0]).config["no_rope_layers"] == [1, 1, 1, 0, 1]


REFUSED = {
    "unknown architecture": (dict(architecture="opt"), r"'opt'.*Implemented: llama, qwen2"),
    "missing key": (dict(architecture="llama", drop=("attention.head_count",)), r"lacks the metadata key llama\.attention\.head_count"),
    "missing softcap": (dict(architecture="gemma2", drop=("attn_logit_softcapping",)), r"gemma2\.attn_logit_softcapping"),
    "experts": (dict(architecture="llama", metadata={"expert_count": 8}), r"llama\.expert_count = 8"),
    "tensor of a variant": (dict(architecture="qwen3", extra={"blk.0.odd.weight": np.ones(4, np.float32)}), r"blk\.0\.odd\.weight"),
    "other rope scaling": (dict(architecture="llama", metadata={"rope.scaling.type": "longrope"}), "'longrope'"),
    "partial rotation": (dict(architecture="llama", metadata={"rope.dimension_count": 8}), "rotates 8 of 16"),
    "heads by layer": (dict(architecture="llama", metadata={"attention.head_count_kv": [2, 4]}), "different llama.attention.head_count_kv"),
    "unequal values": (dict(architecture="llama", metadata={"attention.value_length": 8}), "another length"),
    "olmo3": (dict(architecture="olmo2", metadata={"attention.sliding_window": 64}), "OLMo 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused(make_gguf, case):
    arguments, message = REFUSED[case]
    if arguments["architecture"] == "opt":
        arguments = arguments | {"config_name": "llama"}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make_gguf(**arguments)[0])


def test_a_vocabulary_alone_is_no_model(make_gguf, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="vocabulary but no model"):
        open_checkpoint(tmp_path / "vocab.gguf")
