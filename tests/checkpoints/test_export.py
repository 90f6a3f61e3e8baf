"""What is exported is what was loaded, name by name and bit by bit, for every family."""

import fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import MODELS

from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.export import export_model, hf_tensors
from jaxllm.checkpoints.load import load_model
from jaxllm.errors import CheckpointError
from jaxllm.models import family_of
from jaxllm.sharding import ShardingRules, make_mesh

FOLDERS = sorted(folder for folder in MODELS.iterdir() if (folder / "config.json").exists())


def load(folder, scan_layers):
    return load_model(open_checkpoint(folder), dtype=jnp.float32, mesh=make_mesh(), rules=ShardingRules(), scan_layers=scan_layers)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_tensors_are_those_loaded(folder, scan_layers):
    source, model = open_checkpoint(folder), load(folder, scan_layers)
    tensors = dict(hf_tensors(model.config, model.params))
    left_out = [*family_of(model.config.family).IGNORED, *(["*lm_head.weight"] if model.config.tie_embeddings else [])]
    assert set(tensors) == {n for n in source.tensors if not any(fnmatch.fnmatchcase(n, pattern) for pattern in left_out)}
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, np.asarray(source.read(name), np.float32), err_msg=name)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.name in ("gemma3_conditional", "phi3", "gpt2")], ids=lambda f: f.name)
def test_a_folder_that_loads_again(folder, tmp_path):
    model = load(folder, True)
    out = export_model(model.config, model.params, tmp_path / "out", base=folder, dtype="float32")
    assert set(open_checkpoint(out).tensors) >= {n for n in open_checkpoint(folder).tensors if "vision" in n}
    again = dict(hf_tensors(model.config, load(out, False).params))
    for name, x in hf_tensors(model.config, model.params):
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(model.config, model.params, out, base=folder)
