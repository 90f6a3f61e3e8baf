"""The tokenizer that several test files share."""

import pytest
from tokenizer_goldens import demo_gguf

from jaxllm.errors import CheckpointError
from jaxllm.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The demo model's tokenizer, or a skip where there is no demo model."""
    try:
        path = demo_gguf()
    except CheckpointError as error:
        pytest.skip(f"the demo model cannot be had: {error}")
    return load_tokenizer(path)
