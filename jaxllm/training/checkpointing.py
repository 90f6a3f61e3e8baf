"""Checkpoints of a run: what a step changes, the place in the data and the settings, together or not at all.

A checkpoint is a folder `step-N` with orbax's arrays in `state`, and a `manifest.json` that names every array and has a SHA-256
of every file: orbax notices neither a truncated nor an altered file. It is made beside its place and renamed when it is whole, so
that a process that is killed while it saves leaves nothing that could be taken for one.
"""

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm.checkpoints.writer import whole_folder
from jaxllm.errors import CheckpointError

logger = logging.getLogger(__name__)
_PREFIX, _MANIFEST, _STATE = "step-", "manifest.json", "state"


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds: `state` placed as asked, `data` the iterator's state, `metrics` those it was saved with."""

    step: int
    state: Any
    data: Any
    metrics: dict[str, float]


class Checkpointer:
    """Saves and restores the checkpoints in one folder.

    Keeps the newest `keep_last`, and the one whose metric `keep_best` is best (least, or greatest with `mode="max"`) besides.
    Saving is asynchronous: `save` copies the arrays to the host and returns; what went wrong is raised by the next call.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_last: int = 2, keep_best: str | None = None, mode: Literal["min", "max"] = "min"):
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_best, self.sign = keep_last, keep_best, 1 if mode == "min" else -1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._damaged: set[int] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f".{_PREFIX}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: checkpoints cannot be written here ({error.strerror}); choose another output folder"
            ) from error

    def save(self, step: int, state: Any, *, data: Any, metrics: dict[str, float] | None = None) -> None:
        """Begins to save. `data` must be what JSON can hold. Raises CheckpointError if the save before it failed."""
        self.wait()
        host = jax.tree.map(lambda x: np.array(x), state)  # a copy: the next step gives these arrays up
        self._saving = self._pool.submit(self._write, step, host, data, metrics or {})

    def wait(self) -> None:
        """Until what was begun is on disk. Raises CheckpointError if it could not be; what was there before still is."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the checkpoint could not be written ({error.strerror or error}); those before it are whole. "
                "Make room or choose another output folder, and start again: the run goes on from the last one"
            ) from error

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, the newest last."""
        found = (path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*") if (path / _MANIFEST).exists())
        return sorted(int(name) for name in found if name.isdigit())

    def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
        """The newest checkpoint (or that of `step`), placed on devices as the arrays or shapes of `like` are; None if there is none.

        One that is damaged is passed over for the one before it, which is logged. Raises CheckpointError if all are damaged, if
        `step` is not there, or if the checkpoint is of another model or optimiser.
        """
        self.wait()
        steps = self.steps() if step is None else [s for s in self.steps() if s == step]
        if not steps:
            if step is not None:
                raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are {self.steps() or 'none'}")
            return None
        for s in reversed(steps):
            folder = self.folder / f"{_PREFIX}{s}"
            manifest, damage = _check(folder)
            if damage is None:
                return self._read(folder, manifest, like)
            self._damaged.add(s)
            logger.warning("%s is damaged (%s): the checkpoint before it is taken", folder, damage)
        names = ", ".join(f"{_PREFIX}{s}" for s in steps)
        raise CheckpointError(f"{self.folder}: every checkpoint is damaged ({names}); remove the folder to start anew")

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, step: int, state: Any, data: Any, metrics: dict[str, float]) -> None:
        target = self.folder / f"{_PREFIX}{step}"
        with whole_folder(target) as staging:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
                orbax.save(staging / _STATE, args=ocp.args.StandardSave(_flat(state)))
            files = {str(f.relative_to(staging)): _digest(f) for f in sorted(staging.rglob("*")) if f.is_file()}
            manifest = {"step": step, "metrics": metrics, "data": data, "arrays": _describe(state), "files": files}
            with open(staging / _MANIFEST, "w", encoding="utf-8") as stream:
                json.dump(manifest, stream)
                stream.flush()
                os.fsync(stream.fileno())
        self._prune(step)

    def _prune(self, step: int) -> None:
        self._damaged.discard(step)  # it has been written anew
        steps = [s for s in self.steps() if s not in self._damaged]  # those are nobody's to count on, nor ours to throw away
        kept = set(steps[-self.keep_last :])
        for s in set(steps) - kept - {self.best()}:
            shutil.rmtree(self.folder / f"{_PREFIX}{s}")

    def best(self) -> int | None:
        """The step whose metric is best, of those kept."""
        scores = {s: _manifest(self.folder / f"{_PREFIX}{s}").get("metrics", {}).get(self.keep_best) for s in self.steps()}
        scored = [s for s in scores if scores[s] is not None]
        return min(scored, key=lambda s: self.sign * scores[s]) if scored else None

    def _read(self, folder: Path, manifest: dict, like: Any) -> Restored:
        stored, wanted = manifest["arrays"], _describe(like)
        if stored != wanted:
            names = sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
            told = "; ".join(f"{k}: {stored.get(k, 'absent')} there, {wanted.get(k, 'absent')} here" for k in names[:6])
            raise CheckpointError(
                f"{folder} is of another model or optimiser ({len(names)} arrays differ: {told}). Give the settings it was made with, or "
                "another output folder"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _flat(like))
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            flat = orbax.restore(folder / _STATE, args=ocp.args.StandardRestore(abstract))
        leaves = [flat[name] for name in _names(like)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(manifest["step"], state, manifest["data"], manifest["metrics"])


def _names(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _flat(tree: Any) -> dict[str, Any]:
    """By name: orbax need know none of our types, and the names stay what they are when the types change."""
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _describe(tree: Any) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _flat(tree).items()}


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _check(folder: Path) -> tuple[dict, str | None]:
    """The manifest, and what is wrong with the checkpoint, if anything."""
    manifest = _manifest(folder)
    if "files" not in manifest:
        return manifest, f"{_MANIFEST} cannot be read"
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return manifest, f"{name} is missing"
        if _digest(file) != digest:
            return manifest, f"{name} is not what was written"
    return manifest, None


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
