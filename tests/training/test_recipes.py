"""Every recipe of configs/train takes a few steps on a tiny model, from the command line as its comment says."""

import json
from pathlib import Path

import pytest
from tiny_models import write_llama

from jaxllm.launch.__main__ import main

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))
PAIR = {"prompt": "red ->", "chosen": " yes", "rejected": " no"}
RECORDS = {
    "train.jsonl": [{"prompt": "red ->", "completion": " yes"}] * 160,
    "eval.jsonl": [{"prompt": "red ->", "completion": " yes"}] * 8,
    "pairs.jsonl": [PAIR] * 8,
    "labels.jsonl": [{"prompt": "red ->", "completion": f" {answer}", "label": answer == "yes"} for answer in ("yes", "no")] * 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_llama(folder / "model", tokenizer=True, max_position_embeddings=1024)
    for name, records in RECORDS.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "train.txt").write_text("one two three four five six seven eight " * 200)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder)  # the data lies where the recipe says
    flags = {"--model": "model", "--output-dir": str(tmp_path / "run"), "--max-steps": "2", "--max-length": "64"}
    code = main(["train", "--config", str(recipe), *(word for pair in flags.items() for word in pair), "--json"])
    out, error = capfd.readouterr()
    assert code == 0, error
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 2 and result["skipped_steps"] == 0 and result["loss"] > 0
    assert (Path(result["path"]) / ("adapter_config.json" if "lora" in recipe.stem else "config.json")).exists()
