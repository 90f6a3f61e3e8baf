"""Checkpoints of a training run: everything together, written while training goes on, whole or not there at all.

    with Checkpointer(folder, keep_last=3, keep_best=("eval_loss", "min")) as checkpointer:
        if checkpointer.steps():
            restored = checkpointer.restore("latest", onto=state)
        ...
        checkpointer.save(step, state, iterator_state=dataset.get_state(), metrics={"eval_loss": 1.2}, config=to_dict(config))

The arrays are written by Orbax (asynchronously, sharded, readable onto another mesh); see `checkpoint_files` for what stands around it.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.training import checkpoint_files as files
from jaxllm.training import processes

logger = logging.getLogger(__name__)

_ARRAYS = "arrays"
_VERSION = 1


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held. `notes` say which damaged checkpoints were passed over, and why."""

    step: int
    state: Any
    iterator_state: bytes | None
    metrics: dict[str, float]
    config: dict[str, Any] | None
    notes: tuple[str, ...] = ()


class Checkpointer:
    """Saves and restores pytrees of arrays (jax or numpy, typed random keys, Python numbers) with what belongs to them.

    Args:
        folder: where the checkpoints are; made if missing.
        keep_last: how many of the newest stay; None keeps all.
        keep_best: (metric, "min" or "max"): the best checkpoint by that metric also stays.
        asynchronous: `save` returns when the arrays are copied, and a thread writes them; an error of the writing is raised by the
            next `save`, `wait` or `close`.

    Several processes make one each, of a folder that all of them see, and call the same methods in the same order: all write their parts of
    the arrays, the first the rest. Raises ConfigError for wrong arguments, CheckpointError for an unusable folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = 3,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
        asynchronous: bool = True,
    ):
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"keep_last is {keep_last}; keep at least 1, or None for all")
        if keep_best is not None and (len(keep_best) != 2 or keep_best[1] not in ("min", "max")):
            raise ConfigError(f"keep_best is {keep_best!r}; give a metric and min or max, as in ('eval_loss', 'min')")
        import orbax.checkpoint as ocp

        self.folder = Path(folder).expanduser().absolute()
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        processes.first_alone(self._open)
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future] | None = None
        self._broken: set[int] = set()
        self._lock: IO[bytes] | None = None

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
            lock = files.lock(self.folder)
            if lock is not None:  # else another process writes here, and what looks left over is its
                files.tidy(self.folder)
                lock.close()
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints into {self.folder} ({error.strerror}): choose another folder") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and jax.process_count() > 1:
            self._pending = None  # who knows where the other processes are
        try:
            self.close()
        except CheckpointError:
            if kind is None:
                raise
            logger.exception("the last checkpoint could not be written")  # the error under way is the one to raise

    def close(self) -> None:
        """Waits for the writing. Raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises CheckpointError if it could not be written."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None

            def written() -> None:
                try:
                    future.result()
                except Exception as error:  # orbax and tensorstore raise errors of many kinds for one and the same cause
                    self._failed(step, error)

            processes.together(written)

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, in order, without those found damaged."""
        return [step for step in files.list_steps(self.folder) if step not in self._broken]

    def best_step(self) -> int | None:
        """The step with the best `keep_best` metric; None if there is none."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def save(
        self,
        step: int,
        state: Any,
        *,
        iterator_state: bytes | None = None,
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` as the checkpoint of `step`; one of the same step is replaced. The arrays may be donated afterwards.

        Raises CheckpointError if it, or the save before it, cannot be written; what was saved before stays as it is.
        """
        self.wait()
        if step < 0:
            raise CheckpointError(f"step is {step}; it must be 0 or more")
        arrays, tree = _to_arrays(state)
        target = files.step_folder(self.folder, step)
        staging = target.with_name(f".saving-{target.name}")
        content = {"version": _VERSION, "step": step, "tree": tree, "metrics": {k: float(v) for k, v in (metrics or {}).items()}}

        def prepare() -> None:
            if self._lock is None and (lock := files.lock(self.folder, wait_s=2)) is None:
                raise CheckpointError(f"another process saves checkpoints into {self.folder}: end it, or choose another folder")
            elif self._lock is None:
                self._lock = lock
            size = sum(array.nbytes for array in arrays.values())
            free = shutil.disk_usage(self.folder).free
            if size > free:
                raise CheckpointError(
                    f"cannot save step {step}: it needs {size / 1e9:.2f} GB and {self.folder} has {free / 1e9:.2f} GB free: make room, or "
                    f"lower keep_last. {self._intact()}"
                )
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                if iterator_state is not None:
                    (staging / "iterator").write_bytes(iterator_state)
                if config is not None:
                    (staging / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
            except OSError as error:
                self._failed(step, error)

        processes.first_alone(prepare)
        try:
            if arrays:
                self._orbax.save(staging / _ARRAYS, arrays)
        except Exception as error:
            self._failed(step, error)
        self._pending = (step, self._thread.submit(self._finish, staging, target, content, step))
        if not self.asynchronous:
            self.wait()

    def restore(self, which: Literal["latest", "best"] | int = "latest", *, onto: Any = None) -> Restored:
        """Reads a checkpoint: the newest, the best by `keep_best`, or that of a step.

        `onto` is a tree like the one saved, of arrays or jax.ShapeDtypeStruct: what is read takes its structure, and its shardings
        (those of another mesh than the saved one's, too); without `sharding` an array goes to the first device. Without `onto` the
        state is a flat dict of arrays by name. A damaged checkpoint is passed over for the one before it (or the next best), with a
        warning and in `notes`, unless a step was asked for by number. Raises CheckpointError if there is none, or if it is another
        model's: then the first names that differ are listed.
        """
        self.wait()
        if which == "best" and self.keep_best is None:
            raise CheckpointError("the best checkpoint is known only with keep_best=(metric, 'min' or 'max')")
        present = files.list_steps(self.folder)
        if isinstance(which, int) and which not in present:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {which}; it has {present or 'none'}")
        wanted = [which] if isinstance(which, int) else self._ranked() if which == "best" else present[::-1]
        notes = []
        for step in wanted:
            folder = files.step_folder(self.folder, step)
            try:
                manifest = files.verify(folder)
            except CheckpointError as error:
                if isinstance(which, int):
                    others = [other for other in present if other != step]
                    raise CheckpointError(f"{self.folder}: {error}; other steps there: {others}") from error
                self._broken.add(step)
                notes.append(f"{error}; it is passed over")
                logger.warning("%s: %s", self.folder, notes[-1])
                continue
            return self._read(folder, manifest, onto, tuple(notes))
        raise CheckpointError(f"{self.folder} has no {'whole ' if notes else ''}checkpoint{': ' if notes else ''}{'; '.join(notes)}")

    def _read(self, folder: Path, manifest: dict[str, Any], onto: Any, notes: tuple[str, ...]) -> Restored:
        if manifest["version"] != _VERSION:
            raise CheckpointError(f"{folder} has version {manifest['version']}, and this jaxllm reads version {_VERSION}: use the other")
        tree = manifest["tree"]
        leaves = _leaves(onto) if onto is not None else {name: None for name in tree}
        if onto is not None:
            _compare(folder, tree, leaves)
        abstract = {name: _abstract(tree[name], leaf) for name, leaf in leaves.items() if tree[name]["size"]}
        try:
            arrays = self._orbax.restore(folder / _ARRAYS, abstract) if abstract else {}
        except Exception as error:  # its bytes are those that were saved, so this is no damage that an older checkpoint would heal
            raise CheckpointError(f"{folder} cannot be read: {str(error)[:500]}") from error
        values = [_from_array(tree[name], arrays.get(name), leaf) for name, leaf in leaves.items()]
        state = jax.tree.unflatten(jax.tree.structure(onto), values) if onto is not None else dict(zip(leaves, values, strict=True))
        iterator, config = folder / "iterator", folder / "config.json"
        return Restored(
            step=manifest["step"],
            state=state,
            iterator_state=iterator.read_bytes() if iterator.exists() else None,
            metrics=manifest["metrics"],
            config=json.loads(config.read_text(encoding="utf-8")) if config.exists() else None,
            notes=notes,
        )

    def _finish(self, staging: Path, target: Path, content: dict[str, Any], step: int) -> None:
        self._orbax.wait_until_finished()
        if not processes.is_first():
            return
        files.write_manifest(staging, content)
        files.put_in_place(staging, target)
        self._broken.discard(step)
        if self.keep_last is not None:
            kept = {*self.steps()[-self.keep_last :], step, *self._ranked()[:1]}
            for other in files.list_steps(self.folder):
                if other not in kept:
                    files.remove(files.step_folder(self.folder, other))

    def _ranked(self) -> list[int]:
        """Steps by the metric of keep_best, the best first and of equals the newest; those without it are left out."""
        if self.keep_best is None:
            return []
        metric, mode = self.keep_best
        scored = []
        for step in self.steps():
            try:
                value = files.read_manifest(files.step_folder(self.folder, step))["metrics"].get(metric)
            except CheckpointError:
                continue
            if value is not None and not math.isnan(value):
                scored.append((value if mode == "min" else -value, -step))
        return [-step for _, step in sorted(scored)]

    def _failed(self, step: int, error: Exception) -> None:
        shutil.rmtree(self.folder / f".saving-{files.step_folder(self.folder, step).name}", ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)[:500] or type(error).__name__
        fix = "make room or choose another folder"
        raise CheckpointError(f"cannot save step {step} in {self.folder} ({reason}): {fix}. {self._intact()}") from error

    def _intact(self) -> str:
        try:
            steps = self.steps()
        except OSError:
            steps = []
        return f"The checkpoints of steps {steps} are as they were" if steps else "No checkpoint was there before"


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves by name, in the tree's order."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise CheckpointError(f"two leaves of the state are called {name}: rename one")
        named[name] = leaf
    return named


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """Shape, dtype and kind (array, key, or a Python number's) of a leaf."""
    if isinstance(leaf, bool | int | float):
        return {"kind": type(leaf).__name__, "shape": [], "dtype": str(np.asarray(leaf).dtype), "size": 1}
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays and numbers")
    kind = "key" if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else "array"
    return {"kind": kind, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "size": math.prod(leaf.shape)}


def _to_arrays(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Orbax writes (it refuses arrays without elements, which need no writing), and the description of every leaf."""
    arrays, tree = {}, {}
    for name, leaf in _leaves(state).items():
        tree[name] = _describe(name, leaf)
        if tree[name]["kind"] == "key":
            tree[name]["impl"] = str(jax.random.key_impl(leaf))
            tree[name]["key_shape"] = list(jax.random.key_data(leaf).shape)
            leaf = jax.random.key_data(leaf)
        tree[name]["host"] = not isinstance(leaf, jax.Array)
        if tree[name]["size"]:
            arrays[name] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)  # a copy: the caller may change its own
    return arrays, tree


def _abstract(saved: dict[str, Any], leaf: Any) -> Any:
    if leaf is None and saved["host"] or isinstance(leaf, np.ndarray | np.generic | bool | int | float):
        return np.empty(saved["shape"], jnp.dtype(saved["dtype"]))  # in NumPy's own types: jax would make 64 bits 32
    sharding = getattr(leaf, "sharding", None) or _first_device()
    if saved["kind"] == "key":
        at = sharding if sharding.is_fully_replicated else _first_device()  # its data have an axis more
        return jax.ShapeDtypeStruct(tuple(saved["key_shape"]), jnp.uint32, sharding=at)
    return jax.ShapeDtypeStruct(tuple(saved["shape"]), jnp.dtype(saved["dtype"]), sharding=sharding)


def _from_array(saved: dict[str, Any], array: Any, leaf: Any) -> Any:
    if saved["kind"] == "key":
        keys = jax.random.wrap_key_data(array, impl=saved["impl"])
        return jax.device_put(keys, leaf.sharding) if getattr(leaf, "sharding", None) is not None else keys
    if saved["kind"] in ("bool", "int", "float"):
        return {"bool": bool, "int": int, "float": float}[saved["kind"]](np.asarray(array)[()])
    if array is None:
        shape, dtype = saved["shape"], jnp.dtype(saved["dtype"])
        return np.zeros(shape, dtype) if saved["host"] else jnp.zeros(shape, dtype, device=getattr(leaf, "sharding", None))
    return array


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _compare(folder: Path, tree: dict[str, Any], leaves: dict[str, Any]) -> None:
    """Raises CheckpointError naming what the checkpoint and the tree to fill do not share."""
    wanted = {name: _describe(name, leaf) for name, leaf in leaves.items()}
    problems = [f"it has no {name}" for name in wanted if name not in tree]
    problems += [f"it has {name}, which is not wanted" for name in tree if name not in wanted]
    for name, ours in wanted.items():
        theirs = tree.get(name, ours)
        if any(theirs[key] != ours[key] for key in ("kind", "shape", "dtype")):
            shown = [f"{side['kind']} {side['dtype']}{side['shape']}" for side in (theirs, ours)]
            problems.append(f"its {name} is {shown[0]}, and {shown[1]} is wanted")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        shown = "; ".join(problems[:5]) + more
        raise CheckpointError(f"{folder} is of another model or optimiser: {shown}: use the settings it was made with")
