"""Device meshes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxllm.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")


def make_mesh(devices: list[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh with every axis of MESH_AXES, of the sizes named (1 if not); the compiler chooses shardings (`AxisType.Auto`).

    Takes the first devices that it needs. Raises ConfigError if there are too few.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = int(np.prod(shape))
    if needed > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise ConfigError(
            f"{asked} needs {needed} devices, and there are {len(devices)} ({devices[0].device_kind}). On the CPU, virtual devices "
            f"come from XLA_FLAGS=--xla_force_host_platform_device_count={needed}, set before Python starts"
        )
    return Mesh(np.array(devices[:needed]).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
