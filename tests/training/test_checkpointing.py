"""Checkpoints: whole or not there, damage found, another mesh, kill -9, full disks; and what was saved comes back bit by bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.training.checkpointing import Checkpointer

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def make_state(seed: int, width: int = 8) -> dict:
    key = jax.random.key(seed)
    params = {"layers": [{"w": jax.random.normal(key, (width, 4)), "b": jnp.ones(4, jnp.bfloat16) * seed}], "empty": jnp.zeros((0, 3))}
    optimizer = optax.adamw(1e-3)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "rng": key,
        "rng_batch": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "tokens": seed * 10**12,
        "scale": 0.1 * seed,
        "flag": True,
        "host": np.arange(3, dtype=np.int64) + 2**40 * seed,
        "int4": jnp.array([1, -2, 3], jnp.int4),
    }


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert type(x) is type(y) and np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def biggest(folder: Path) -> Path:
    return max((file for file in (folder / "arrays").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_everything_comes_back(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(7, state, iterator_state=b"\x00place", metrics={"loss": 1.5}, config={"lr": 1e-4, "names": ["a"]})
    with Checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.restore("latest", onto=make_state(0))
        flat = checkpointer.restore(7).state
    assert_same(restored.state, state)
    assert (restored.step, restored.iterator_state, restored.metrics, restored.notes) == (7, b"\x00place", {"loss": 1.5}, ())
    assert restored.config == {"lr": 1e-4, "names": ["a"]}
    assert flat["tokens"] == 3 * 10**12 and np.array_equal(flat["params.layers.0.w"], state["params"]["layers"][0]["w"])


def test_restores_onto_shapes_alone(tmp_path):
    state = {"w": jnp.arange(4.0), "empty": jnp.zeros((0, 2)), "key": jax.random.key(1)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        assert_same(checkpointer.restore(onto=jax.eval_shape(lambda: state)).state, state)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    step = jax.jit(lambda x: x * 1.0001 + 1, donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=None) as checkpointer:
        x, expected = jnp.zeros((512, 1024)), {}
        for number in range(4):
            expected[number] = np.array(x, copy=True)
            checkpointer.save(number, {"x": x})
            for _ in range(20):
                x = step(x)
        for number, value in expected.items():
            assert np.array_equal(checkpointer.restore(number, onto={"x": x}).state["x"], value)


def test_host_arrays_may_change_while_they_are_written(tmp_path):
    array = np.zeros(1 << 20)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": array})
        array[:] = 1
        assert not checkpointer.restore(onto={"x": array}).state["x"].any()


def test_keeps_the_last_and_the_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_best=("eval_loss", "min")) as checkpointer:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 4.0]):
            checkpointer.save(step, {"x": jnp.float32(step)}, metrics={"eval_loss": loss})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3, 4] and checkpointer.best_step() == 1
        assert checkpointer.restore("best", onto={"x": jnp.float32(0)}).step == 1
        assert sorted(path.name for path in tmp_path.glob(".retired*")) == []
    with Checkpointer(tmp_path, keep_best=("eval_loss", "max")) as checkpointer:
        assert checkpointer.best_step() == 4


@pytest.mark.parametrize("harm", ["bytes", "truncated", "missing", "manifest", "no manifest", "iterator"])
def test_damage_is_found_and_the_previous_one_used(tmp_path, harm, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": jnp.full(100, step)}, iterator_state=b"at %d" % step)
    folder = tmp_path / "step-00000002"
    if harm == "bytes":
        damage(biggest(folder))
    elif harm == "truncated":
        os.truncate(biggest(folder), 10)
    elif harm == "missing":
        biggest(folder).unlink()
    elif harm == "manifest":
        damage(folder / "manifest.json")
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        damage(folder / "iterator")
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(onto={"x": jnp.zeros(100, jnp.int32)})
        assert restored.step == 1 and restored.iterator_state == b"at 1" and int(restored.state["x"][0]) == 1
        assert len(restored.notes) == 1 and "step-00000002" in restored.notes[0] and "passed over" in caplog.text
        with pytest.raises(CheckpointError, match=r"step-00000002 is .*other steps there: \[1\]"):
            checkpointer.restore(2, onto={"x": jnp.zeros(100, jnp.int32)})
        checkpointer.save(2, {"x": jnp.full(100, 5)})  # the resumed run comes there again
        assert int(checkpointer.restore(onto={"x": jnp.zeros(100, jnp.int32)}).state["x"][0]) == 5


def test_all_damaged_or_none_is_an_error(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            checkpointer.restore()
        checkpointer.save(1, {"x": jnp.ones(3)})
        checkpointer.wait()
        damage(biggest(tmp_path / "step-00000001"))
        with pytest.raises(CheckpointError, match="no whole checkpoint: step-00000001 is damaged"):
            checkpointer.restore()
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; it has \[1\]"):
            checkpointer.restore(9)


def test_another_model_is_refused_by_names(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(1)}, "k": 1})
        onto = {"a": jnp.ones((2, 4)), "b": {"d": jnp.ones(1)}, "k": 1}
        with pytest.raises(CheckpointError, match=r"no b\.d; it has b\.c, which is not wanted; its a is .*\[2, 3\], and .*\[2, 4\]"):
            checkpointer.restore(onto=onto)
        with pytest.raises(CheckpointError, match="float16"):
            checkpointer.restore(onto={"a": jnp.ones((2, 3), jnp.float16), "b": {"c": jnp.ones(1)}, "k": 1})


def test_wrong_arguments_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="keep_last"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ConfigError, match="keep_best"):
        Checkpointer(tmp_path, keep_best=("loss", "least"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another folder"):
        Checkpointer(tmp_path / "file" / "run")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="name is a str"):
        checkpointer.save(0, {"name": "x"})


def test_one_writer_at_a_time(tmp_path):
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.save(1, {"x": jnp.ones(3)})
        first.wait()
        assert second.restore(onto={"x": jnp.ones(3)}).step == 1
        with pytest.raises(CheckpointError, match="another process"):
            second.save(2, {"x": jnp.ones(3)})


def run_script(source: str, *arguments: str, environment: dict | None = None) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **(environment or {})}
    return subprocess.Popen([sys.executable, "-c", source, *arguments], env=variables, stdout=subprocess.PIPE, text=True)


FULL_DISK = """
import resource, sys, jax.numpy as jnp, numpy as np
from jaxllm.errors import CheckpointError
from jaxllm.training.checkpointing import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
small = {"x": jnp.arange(10.0)}
checkpointer.save(1, small)
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpointer.save(2, {"x": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000))})
    checkpointer.close()
    print("saved?")
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert checkpointer.restore(onto=small).step == 1
"""


def test_writing_that_fails_leaves_the_others(tmp_path):
    process = run_script(FULL_DISK, str(tmp_path))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "cannot save step 2" in output and "The checkpoints of steps [1] are as they were" in output
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["step-00000001"]


def test_a_full_disk_is_known_beforehand(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        usage = type("usage", (), {"free": 100})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(CheckpointError, match="needs 0.00 GB .* No checkpoint was there before"):
            checkpointer.save(1, {"x": jnp.ones(1000)})


OTHER_MESH = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.checkpointing import Checkpointer
w = np.arange(64.0 * 16, dtype=np.float32).reshape(64, 16)
first = NamedSharding(make_mesh(fsdp=4, tensor=2), P("fsdp", "tensor"))
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"w": jax.device_put(w, first)})
    for sizes, spec in [(dict(fsdp=2, tensor=4), P("tensor", "fsdp")), (dict(data=8), P("data")), (dict(fsdp=3), P())]:
        sharding = NamedSharding(make_mesh(**sizes), spec)
        onto = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
        restored = checkpointer.restore(onto=onto).state["w"]
        assert restored.sharding == sharding and np.array_equal(restored, w), sizes
    assert np.array_equal(checkpointer.restore(onto={"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}).state["w"], w)
print("same")
"""


def test_restores_onto_another_mesh(tmp_path):
    process = run_script(OTHER_MESH, str(tmp_path), environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert process.communicate(timeout=120)[0].strip() == "same" and process.returncode == 0


SAVE_FOREVER = """
import sys, jax, jax.numpy as jnp
from jaxllm.training.checkpointing import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep_last=2, keep_best=("loss", "min"))
step = checkpointer.steps()[-1] if checkpointer.steps() else 0
started = step
while True:
    step += 1
    state = {"w": jax.random.normal(jax.random.key(step), (256, 256)), "step": step}
    checkpointer.save(step, state, iterator_state=b"%d" % step, metrics={"loss": 1 / step})
    if step == started + 2:
        print("ready", flush=True)
"""


def check_after_kill(folder: Path) -> int:
    with Checkpointer(folder) as checkpointer:
        if not checkpointer.steps():
            return 0
        restored = checkpointer.restore(onto={"w": jnp.zeros((256, 256)), "step": 0})
        assert not restored.notes and restored.step == restored.state["step"] == checkpointer.steps()[-1]
        assert restored.iterator_state == b"%d" % restored.step
        assert np.array_equal(restored.state["w"], jax.random.normal(jax.random.key(restored.step), (256, 256)))
        assert not list(folder.glob(".saving*")) and not list(folder.glob(".retired*"))
        return restored.step


def kill_repeatedly(folder: Path, times: int, seed: int) -> None:
    generator, last = random.Random(seed), 0
    for _ in range(times):
        process = run_script(SAVE_FOREVER, str(folder))
        assert process.stdout.readline().strip() == "ready"
        time.sleep(generator.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        step = check_after_kill(folder)
        assert step >= last
        last = step
    assert last > times


def test_killed_while_saving(tmp_path):
    kill_repeatedly(tmp_path, 4, seed=0)


@pytest.mark.slow
def test_killed_while_saving_at_many_moments(tmp_path):
    kill_repeatedly(tmp_path, 20, seed=1)
