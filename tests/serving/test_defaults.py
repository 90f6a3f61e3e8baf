"""What an engine, and a plan of one, choose where they are told nothing."""

import pytest

from jaxllm.serving.defaults import default_dtype


@pytest.mark.parametrize(
    "platform, entries, dtype",
    [
        ("tpu", {"torch_dtype": "float32"}, "float32"),
        ("v6e", {"dtype": "float16"}, "float16"),
        ("gpu", {"torch_dtype": "float64"}, "bfloat16"),
        ("h100", {}, "bfloat16"),
        ("cpu", {"torch_dtype": "bfloat16"}, "float32"),
    ],
)
def test_dtype(platform, entries, dtype):
    assert default_dtype(platform, entries) == dtype
