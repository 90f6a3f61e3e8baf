"""Chips by name, and topologies of them that are not here."""

import difflib
import importlib.util
import logging
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.planning.gpus import GPUS, Gpu, gpu_devices
from jaxllm.sharding.chips import TPUS, Chip

logger = logging.getLogger(__name__)

_given: list[str] = []  # the flags that this process has given libtpu, once it has


def _chip(gpu: Gpu) -> Chip:
    kind = gpu.device_kind
    return Chip(gpu.name, kind, (kind,), gpu.memory_bytes, gpu.bandwidth, gpu.flops, 1, ("1", "2", "4", "8"), "gpu")


CHIPS = TPUS | {gpu.name: _chip(gpu) for gpu in GPUS.values()}


@dataclass(frozen=True)
class Topology:
    """Devices that are not here, for a compiler that is; or this machine's processor (`cpu`)."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def find_topology(name: str, *, dtype: Any = "bfloat16") -> Topology:
    """`v6e:2x2`, `h100:8` and the like; or `cpu`, whose speed with weights of `dtype` is measured. Raises ConfigError if there is no such
    chip, or nothing that compiles for it."""
    chip_name, _, shape = name.partition(":")
    if chip_name == "cpu":
        return _this_machine(name, shape, dtype)
    if chip_name not in CHIPS:
        near = difflib.get_close_matches(chip_name, CHIPS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"topology {name!r}: no chip {chip_name!r} is known, but {', '.join(CHIPS)} and cpu are{hint}")
    chip = CHIPS[chip_name]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != chip.shape:
        numbers = f"{chip.shape} numbers" if chip.shape > 1 else "one number"
        raise ConfigError(f"topology {name!r} must have a shape of {numbers}, like {chip.name}:{chip.usual[1]}")
    if chip.platform == "gpu":
        return Topology(name, chip, gpu_devices(GPUS[chip.name], int(shape)))
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs libtpu: pip install 'jaxllm[plan]'")
    # libtpu asks the machine which TPU it is on unless it is told, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened: other processes may do the same
    _give_flags(chip)
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(f"{chip.compiler_name}:{shape}", "tpu", **_hosts(chip, shape))
    except Exception as error:  # JAX raises whatever the plugin says
        raise ConfigError(f"topology {name!r} was refused by the compiler; usual ones: {', '.join(chip.usual)} ({error})") from error
    return Topology(name, chip, tuple(description.devices))


def _give_flags(chip: Chip) -> None:
    """libtpu reads them once: the first topology of a process decides."""
    missing = chip.missing_flags()
    if not _given:
        _given.append(missing)
        if missing:
            os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {missing}".strip()
    elif missing or (_given[0] and not chip.libtpu_flags):
        logger.warning("%s is compiled with another chip's flags of libtpu: plan it in a process of its own", chip.name)


def _this_machine(name: str, shape: str, dtype: Any) -> Topology:
    if shape not in ("", "1"):
        raise ConfigError(f"topology {name!r}: this machine's processor is one device to JAX: cpu")
    import jax

    from jaxllm.planning.cpus import cpu_chip

    return Topology(name, cpu_chip(dtype), tuple(jax.devices("cpu")[:1]))


def _hosts(chip: Chip, shape: str) -> dict[str, Any]:
    """A single chip is less than the four that a host has by default."""
    return {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if shape == "1x1" else {}
