"""The tokenizer that several test files share."""

import pytest
from tokenizer_goldens import demo_gguf

from jaxllm.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The demo model's tokenizer, or a skip where there is no demo model."""
    path = demo_gguf()
    if not path.exists():
        pytest.skip("the demo model is not here: set JAXLLM_TEST_DEMO_GGUF to its GGUF file")
    return load_tokenizer(path)
