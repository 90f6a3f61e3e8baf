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
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

logger = logging.getLogger(__name__)

_PACKAGES = ("jaxllm/models", "jaxllm/serving", "jaxllm/sharding", "pallas_kernels")  # whose code programs are made from


class ExecutableCache:
    """Programs in `folder`, for one engine. `made_from`: all that its programs depend on besides what is the same for every engine."""

    def __init__(self, folder: str | os.PathLike, mesh: Mesh, made_from: Any):
        self._folder, self._devices = Path(folder), list(mesh.devices.flat)
        environment = (_source(), _machine(), os.environ.get("XLA_FLAGS"), jax.config.values.get("jax_default_matmul_precision"))
        first = self._devices[0]
        runtime = (first.client.platform, first.client.platform_version, first.device_kind, len(first.client.devices()))
        devices = ([d.id for d in self._devices], mesh.axis_names, mesh.devices.shape)
        self._key = repr((jax.__version__, jaxlib.__version__, environment, runtime, devices, made_from))

    def get(self, name: str, compile_: Callable[[], Any]) -> Any:
        """The program of that name, compiled if it is not there."""
        path = self._folder / f"{hashlib.blake2b(f'{self._key}/{name}'.encode(), digest_size=20).hexdigest()}.xla"
        try:
            return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()), execution_devices=self._devices)
        except FileNotFoundError:
            pass
        except Exception as error:  # cut short, or of a runtime that cannot read it: it is only a copy
            logger.warning("%s is not usable (%s); compiling %s anew", path, error, name)
        program = compile_()
        try:
            self._write(path, pickle.dumps(serialize_executable.serialize(program)))
        except Exception as error:  # a full disk, or a backend that cannot serialise: the program runs all the same
            logger.debug("%s is not kept: %s", name, error)
        return program

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
