"""Structured output under load, by the command that measures it."""

import json

import jsonschema
import pytest
from tiny_models import write_llama

from jaxllm.launch.__main__ import main
from jaxllm.launch.bench.schemas import draw_schemas, endless

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = write_llama(tmp_path_factory.mktemp("model"), tokenizer=True, eos_token_id=4, vocab_size=640)
    return ["bench", "structured", "--model", str(folder), "--max-num-seqs", "8", "--output-len", "16", "--repeats", "1"]


def test_texts_of_random_weights_are_valid_under_fifty_schemas(command, capfd):
    assert main([*command, "--num-requests", "150", "--num-schemas", "50", "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["valid"] == 150 and found["compiles_after_warmup"] == 0 and found["constrained_s"] > 0


def test_a_text_that_is_cut_off_is_found(command, capfd):
    assert main([*command, "--num-requests", "2", "--num-schemas", "1", "--max-tokens", "3"]) == 1
    assert "texts are not valid, the first" in capfd.readouterr().err


def test_schemas_differ_and_are_schemas():
    schemas = draw_schemas(50)
    assert len({json.dumps(schema) for schema in schemas}) == 50 and schemas[:5] == draw_schemas(5) != draw_schemas(5, seed=1)
    for schema in [*schemas, endless()]:
        jsonschema.Draft202012Validator.check_schema(schema)
