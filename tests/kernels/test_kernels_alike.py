"""What is asked of the GPU's and the TPU's kernels alike, each in its own interpreter and held to its own check."""

import jax.numpy as jnp
import numpy as np
import pytest
import test_gpu_kernels
import test_tpu_kernels
from hypothesis import given, settings
from test_ragged_paged_attention import batches, make_batch

pytestmark = pytest.mark.usefixtures("compiled_quickly")  # what chips run is not compiled here: this is the interpreter

alike = pytest.mark.parametrize("check", [test_gpu_kernels.check, test_tpu_kernels.check], ids=["gpu", "tpu"])


@alike
@settings(max_examples=4, deadline=None)
@given(batch=batches(16))
def test_bfloat16(check, batch):
    check(make_batch(batch, 16, 8, 2, 128, jnp.bfloat16), atol=2e-2)


@alike
@pytest.mark.parametrize("num_decode", [0, 1, 12])
def test_decode_only(num_decode, check):
    rng = np.random.default_rng(num_decode)
    past = rng.integers(0, 300, num_decode).tolist()
    check(make_batch((num_decode, [1] * num_decode, past, 5), 16, 4, 2, 128), atol=1e-5, decode_only=True)
