"""Plans of this machine: the very programs of the engine, its pool, and what the process uses."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_plan import MODELS
from tiny_models import write_llama

from jaxllm import LLM
from jaxllm.errors import ConfigError
from jaxllm.launch.plan import Config, read_model_config
from jaxllm.planning import Chip, Topology, find_topology, plan_serving, serving
from jaxllm.planning.abstract import abstract_engine, bytes_on_a_device
from jaxllm.serving.batch import step_layout

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_this_machine.py"
SIZES = dict(max_num_seqs=3, max_model_len=2000, max_num_batched_tokens=16)  # of KV cache, more than a processor's caches are taken to hold
CHIP = Chip("cpu", "cpu", ("cpu",), 1 << 30, 10e9, 100e9, 1, ("1",), "cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One that has compiled nothing."""
    folder = write_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3, hidden_size=64, vocab_size=4096)
    return LLM(folder, **SIZES, warmup=False, skip_tokenizer_init=True, compilation_cache_dir="").engine


@pytest.fixture(scope="module")
def here():
    return Topology("cpu", CHIP, tuple(jax.devices("cpu")[:1]))


def test_a_plan_compiles_what_the_engine_does(engine, here):
    config = engine.runner.model.config
    sizes = {name: SIZES[name] for name in ("max_num_seqs", "max_model_len")}
    planned = abstract_engine(config, here.devices, tensor=1, dtype=jnp.float32, page_size=8, **sizes)
    bucket = next(bucket for bucket in engine.runner.buckets if bucket.decode)
    layout = step_layout(bucket, engine.runner.max_pages)

    def text(programs):
        """Of all programs, without the places in the source that they were made from."""
        made = jax.tree.leaves(programs.compile_layers(bucket, layout), is_leaf=lambda x: hasattr(x, "as_text"))
        bodies = [re.search(r"^(%|ENTRY).*", program.as_text(), re.M | re.S)[0] for program in made]
        return [re.sub(r", metadata=\{[^}]*\}", "", body) for body in bodies]

    assert text(planned) == text(engine.runner.programs)


def test_a_plan_has_the_engines_sizes_and_counts_what_it_must_move(engine, here):
    plan, runner = plan_serving(engine.runner.model.config, here, tensor=1, dtype=jnp.float32, **SIZES), engine.runner
    held = plan.per_chip_bytes
    assert plan.settings["num_pages"] == runner.num_pages and plan.settings["page_size"] == runner.limits.page_size
    assert held["parameters"] == bytes_on_a_device(runner.model.params)
    assert held["kv_cache"] == runner.state.kv_pages.nbytes
    assert held["runtime"] > 30 << 20 and held["compiling"] > 0
    assert held["total"] == sum(size for name, size in held.items() if name not in ("total", "capacity"))
    assert plan.fits and plan.max_sequences > 3 and plan.max_context == 2048
    assert 0.95 <= plan.decode.bytes_moved / plan.decode.bytes_minimum <= 1.3
    matrices = sum(x.size for x in jax.tree.leaves(runner.model.params) if x.ndim == 2)
    assert 2 * 3 * matrices < plan.decode.flops
    assert plan.decode.bound_s == max(plan.decode.bytes_moved / 10e9, plan.decode.flops / 100e9)


@pytest.mark.parametrize(
    "parameters,most,remedy",
    [
        (5 << 30, 0, "bfloat16"),
        (1 << 30, 2, "lower max_num_seqs to 2, or max_model_len"),
        (1 << 30, 0, "lower max_num_seqs or max_model_len"),
    ],
)
def test_what_does_not_fit_in_this_machine(parameters, most, remedy):
    said = serving._remedy(parameters, 4 << 30, most, 8, 1, 1, None, "cpu")
    assert remedy in said and "chips" not in said


def test_the_engines_pool_on_a_cpu_is_a_gib(here):
    """Sixty-four sequences of 2,048 tokens of a model that takes 46 KB for each would be 6 GB."""
    config = read_model_config(str(MODELS / "qwen3-0.6b.yaml"))
    planned = abstract_engine(config, here.devices, tensor=1, dtype=jnp.float32, page_size=8, max_num_seqs=64, max_model_len=2048)
    assert 0.99 < planned.abstract_state[0].size * 4 / (1 << 30) <= 1.01


@pytest.mark.parametrize("name", ["cpu:2", "cpu:2x2"])
def test_a_processor_is_one_device(name):
    with pytest.raises(ConfigError, match="one device"):
        find_topology(name)


def test_a_training_step_is_measured_and_not_planned():
    with pytest.raises(ConfigError, match="--dry-run"):
        Config(topology="cpu", train="recipe.yaml")


@pytest.mark.slow
def test_memory_and_the_order_of_speeds_are_as_predicted(tmp_path, monkeypatch):
    """In processes of their own: the engine's memory at its peak within a tenth of what the plan says, and its steps in its order."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # a user's machine has one device
    spec = importlib.util.spec_from_file_location("plan_this_machine", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
    folder = write_llama(tmp_path, tokenizer=True, vocab_size=16384, **sizes)
    results = [benchmark.beside(str(folder), name, batched=64) for name in ("4x256:float32", "8x1024:float32", "24x1024:float32")]
    for result in results:
        assert 0.9 <= result["ratio"] <= 1.1, result
    by = lambda key: sorted(range(3), key=lambda i: results[i][key])
    assert by("predicted_step_s") == by("measured_step_s"), results
