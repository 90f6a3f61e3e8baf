"""Compiled programs kept between runs.

JAX's own cache spares XLA's work, but finding an entry there takes tracing and lowering the program first, which is most of a
warm start. Here a program is found by what it is made from: this package's source, the versions, the devices, the configuration.
(Not both: an executable that came out of JAX's cache does not serialise whole.)
"""

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxllm.serving.bundle import read_manifest
from pallas_kernels.ragged_paged_attention import Table

logger = logging.getLogger(__name__)

_PACKAGES = ("jaxllm/models", "jaxllm/serving", "jaxllm/sharding", "pallas_kernels")  # whose code programs are made from


class ExecutableCache:
    """Programs in `folder`, for one engine. `made_from`: all that its programs depend on besides what is the same for every engine;
    `tuned`: the kernels' block sizes, if they were measured.

    Those that are in `bundle`, a folder that `write_manifest` has finished, are taken from there. A bundle that was made from
    something else, or is damaged, is not used, which is logged with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        mesh: Mesh,
        made_from: Any,
        *,
        tuned: Table | None = None,
        bundle: str | os.PathLike | None = None,
    ):
        self._folder, self._devices = None if folder is None else Path(folder), list(mesh.devices.flat)
        first = self._devices[0]
        self.made_from = {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "the source of jaxllm": _source(),
            "the processor": _machine(),
            "XLA_FLAGS": str(os.environ.get("XLA_FLAGS")),
            "LIBTPU_INIT_ARGS": str(os.environ.get("LIBTPU_INIT_ARGS")),
            "jax_default_matmul_precision": str(jax.config.values.get("jax_default_matmul_precision")),
            "the devices": repr((first.client.platform, first.device_kind, len(first.client.devices()))),
            "the runtime": first.client.platform_version,
            "the mesh": repr(([d.id for d in self._devices], mesh.axis_names, mesh.devices.shape)),
            "the kernels' block sizes": "a heuristic's" if tuned is None else tuned.digest,
            "the model and the engine's settings": repr(made_from),
        }
        self._key = repr(self.made_from)
        self.names: dict[str, str] = {}  # what has been asked for: file -> name
        self._bundle = None if bundle is None else _open_bundle(Path(bundle), self.made_from)

    def get(self, name: str, compile_: Callable[[], Any]) -> Any:
        """The program of that name, compiled if it is not there."""
        file = f"{hashlib.blake2b(f'{self._key}/{name}'.encode(), digest_size=20).hexdigest()}.xla"
        self.names[file] = name
        if self._bundle is not None and (program := self._load(self._bundle.folder / file, name, self._bundle.digests.get(file))):
            return program
        if self._folder is None:
            return compile_()
        if program := self._load(self._folder / file, name):
            return program
        program = compile_()
        try:
            self._write(self._folder / file, pickle.dumps(serialize_executable.serialize(program)))
        except Exception as error:  # a full disk, or a backend that cannot serialise: the program runs all the same
            logger.debug("%s is not kept: %s", name, error)
        return program

    def _load(self, path: Path, name: str, digest: str | None = None) -> Any | None:
        """The program in a file, if it is whole."""
        try:
            data = path.read_bytes()
            if digest is not None and hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its bytes are not those that the manifest names")
            return serialize_executable.deserialize_and_load(*pickle.loads(data), execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # cut short, or of a runtime that cannot read it: it is only a copy
            logger.warning("%s is not usable (%s); compiling %s anew", path, error, name)
            return None

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all: other processes may be reading."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(staging, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staging)
            raise


@cache
def _source() -> str:
    """A hash of the code that programs are made from."""
    root = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=16)
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@cache
def _machine() -> str:
    """The processor, with its instruction sets: programs for the CPU run on no lesser one."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), platform.machine())


@dataclass(frozen=True)
class _Bundle:
    folder: Path
    digests: dict[str, str]


def _open_bundle(folder: Path, made_from: dict[str, str]) -> _Bundle | None:
    manifest = read_manifest(folder)
    short = lambda value: value if len(value) < 60 else f"{value[:28]}...{value[-28:]}"
    differ = [
        f"{name} ({short(str(manifest['made_from'].get(name)))}, here {short(value)})"
        for name, value in made_from.items()
        if manifest["made_from"].get(name) != value
    ]
    if differ:
        logger.warning("the bundle %s is not used, everything is compiled: it was made with another %s", folder, "; ".join(differ))
        return None
    return _Bundle(folder, {file: program["sha256"] for file, program in manifest["programs"].items()})
