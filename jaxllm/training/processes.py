"""Training by several processes, a host each: what only the first does, where they wait for each other, and how they stop together.

Every process runs the same program on the same batches, and holds the part of the arrays that is its devices'. The first alone writes what
is no array; all write their parts of a checkpoint, into one folder that all of them see.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxllm.errors import CheckpointError, ConfigError


def join(coordinator_address: str, num_processes: int | None, process_id: int | None) -> None:
    """Meets the other processes, before anything asks for a device. Raises ConfigError if they are not there."""
    address = None if coordinator_address == "auto" else coordinator_address
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"coordinator_address={coordinator_address}: the processes did not meet: {str(error)[:300]}") from error


def is_first() -> bool:
    return jax.process_index() == 0


def check_mesh(mesh: Mesh) -> None:
    """Raises ConfigError for a mesh that leaves devices out where there are several processes: theirs would have no part in it."""
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {mesh.size}, and {jax.process_count()} processes have {jax.device_count()} devices: "
            "use all of them"
        )


def first_says(x: bool) -> bool:
    """What the first process found, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(x))) if jax.process_count() > 1 else x


def first_alone(work: Callable[[], Any]) -> None:
    """The first process does it, and the others wait. See `together`."""
    together(work if is_first() else lambda: None)


def together(work: Callable[[], Any]) -> None:
    """Every process does its work, and goes on when all have done it. An error of one is an error of all: CheckpointError in those that had
    none themselves, which would else wait for one that has left."""
    error = None
    try:
        work()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array([error is not None]), tiled=True).any()
        if failed and error is None:
            raise CheckpointError("another process could not write: see what it says")
    if error is not None:
        raise error


def whole(x: jax.Array) -> jax.Array | np.ndarray:
    """All of an array whose parts lie with several processes, each of which asks for it."""
    return x if x.is_fully_addressable or x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)


@contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """A function of the step that tells whether SIGTERM has come; a second one ends the process as ever. Several processes all learn it at
    one step, of whichever was asked."""
    if jax.process_count() > 1:  # JAX has taken the signal for its own, as the processes met
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set handlers
        yield lambda step: bool(asked)
        return

    def handle(number, frame):
        asked.append(number)
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
