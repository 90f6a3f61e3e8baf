"""Reading weights takes their own memory and at most that of the two largest tensors besides."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.checkpoints import open_checkpoint, write_safetensors
from jaxllm.checkpoints.load import abstract_decoder
from jaxllm.models import config_from_hf

CONFIG = {
    "model_type": "llama",
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
}
SCRIPT = """
import json, sys, threading, time
import jax, jax.numpy as jnp, psutil
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.sharding import ShardingRules, make_mesh

def resident():
    info = psutil.Process().memory_info()
    return info.rss - info.shared

folder, dtype, scan = sys.argv[1], sys.argv[2], sys.argv[3] == "scan"
mesh, source = make_mesh(), open_checkpoint(folder)
jnp.zeros(3).block_until_ready()
start, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(source, dtype=jnp.dtype(dtype), mesh=mesh, rules=ShardingRules(), scan_layers=scan)
done = True
watcher.join()
sizes = sorted(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(json.dumps({"peak": peak - start, "weights": sum(sizes), "two_largest": sum(sizes[-2:])}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """270 MB of float32 weights."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    _, state = abstract_decoder(config_from_hf(CONFIG), scan_layers=False, dtype=np.float32)
    from flax import nnx

    from jaxllm.models.families import llama

    names = llama.weights(config_from_hf(CONFIG))
    rng = np.random.default_rng(0)

    def tensors():
        for path, variable in nnx.to_flat_state(state):
            layer = path[1] if path[0] == "layers" else None
            key = ".".join(map(str, ("layers", "{i}", *path[2:]) if layer is not None else path))
            yield names[key].name.format(i=layer), rng.standard_normal(variable.shape, np.float32)

    write_safetensors(folder, tensors(), CONFIG)
    assert open_checkpoint(folder).config["vocab_size"] == 16_000
    return folder


@pytest.mark.parametrize("dtype,scan", [("float32", "unrolled"), ("bfloat16", "unrolled"), ("float32", "scan")])
def test_peak(folder, dtype, scan):
    out = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), dtype, scan], capture_output=True, text=True, check=True)
    figures = json.loads(out.stdout.splitlines()[-1])
    assert figures["peak"] >= 0.9 * figures["weights"]  # the watcher has seen it
    assert figures["peak"] <= figures["weights"] + figures["two_largest"], figures
