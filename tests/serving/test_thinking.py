"""A grammar that begins when the thought is over."""

import json

import numpy as np
import pytest
from golden_cases import FOLDER
from tiny_models import write_llama

from jaxllm import LLM, SamplingParams
from jaxllm.errors import RequestError
from jaxllm.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tokenizer for which the marks are tokens of their own."""
    folder = write_llama(tmp_path_factory.mktemp("thinking"), tokenizer=True, eos_token_id=4, vocab_size=640)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    marks = {entry["content"] for entry in tokenizer["added_tokens"]}
    for i, mark in enumerate({"<think>", "</think>"} - marks):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 610 + i, "content": mark, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return LLM(folder, dtype="float32", max_num_seqs=8, max_num_batched_tokens=16, max_model_len=128, page_size=4)


def ask(llm, prompt, thinking, bias, count=8):
    """Texts with a grammar; `bias`: how much the marks are wanted."""
    marks = {llm.get_tokenizer().backend.token_to_id(mark): value for mark, value in bias.items()}
    structured = {"regex": "[0-9]{4}", "thinking": thinking}
    asked = [SamplingParams(seed=seed, max_tokens=100, logit_bias=marks, structured_outputs=structured) for seed in range(count)]
    return [output.outputs[0] for output in llm.generate([prompt] * count, asked)]


def test_open(llm):
    outputs = ask(llm, "a<think>", "open", {"</think>": 6.0, "<think>": -100.0})
    thoughts = [output.text.partition("</think>") for output in outputs if output.finish_reason == "stop" and "</think>" in output.text]
    assert len(thoughts) >= 4 and any(thought for thought, _, _ in thoughts)
    assert all(rest.isdigit() and len(rest) == 4 for _, _, rest in thoughts)


def test_may(llm):
    """Whatever the model chooses to begin with, the grammar comes."""
    eager = ask(llm, "a", "may", {"<think>": 100.0, "</think>": 6.0}, count=4)
    assert all(output.text.startswith("<think>") for output in eager)
    for output in ask(llm, "a", "may", {"<think>": -100.0}, count=4):
        assert output.text.isdigit() and len(output.text) == 4 and output.finish_reason == "stop"
    assert llm.engine.runner.stats.compiles_after_warmup == 0


def test_refused(llm):
    with pytest.raises(RequestError, match="thinking"):
        SamplingParams(structured_outputs={"regex": "a", "thinking": "maybe"})


def test_an_end_of_several_tokens():
    """A thought's end of several tokens."""
    from jaxllm.serving.structured import Grammars, StructuredOutputs

    tokenizer = load_tokenizer(FOLDER / "tokenizers" / "byte_bpe")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [4])
    every = np.full(-(-tokenizer.vocab_size // 32), 0xFFFFFFFF, np.uint32)
    matcher = grammars.matcher(StructuredOutputs(regex="[0-9]{2}", thinking="open"))
    for token in tokenizer.encode("well</think>", add_special_tokens=False):
        assert (grammars.masks([matcher])[0] == every).all()
        assert not matcher.take(token)
    constrained = grammars.masks([matcher.copy()])[0]
    assert (constrained == grammars.masks([grammars.matcher(StructuredOutputs(regex="[0-9]{2}"))])[0]).all()
    assert not (constrained == every).all()
