"""GPUs by name, as CUDA's compiler wants them described, and topologies of them that are not here."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError

GPUS_OF_A_HOST = 8
REMEDY = "compiling for GPUs needs jax's CUDA plugin, of 5 GB, in an environment of its own: pip install 'jaxllm[cuda]'"


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA publishes of one: its name as JAX gives it, compute capability, memory in bytes and bytes a second, dense bfloat16
    operations a second; multiprocessors, and of each the shared memory, the threads, the float32 units; second-level cache; clock."""

    name: str
    device_kind: str
    capability: tuple[int, int]
    memory_bytes: int
    bandwidth: float
    flops: float
    processors: int
    shared_memory: int
    threads: int
    units: int
    cache_bytes: int
    ghz: float

    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # sm_90a, sm_100a
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_memory} shared_memory_per_block_optin: {self.shared_memory - 1024}
            threads_per_core_limit: {self.threads} core_count: {self.processors} fpus_per_core: {self.units}
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache_bytes} clock_rate_ghz: {self.ghz}
            device_memory_size: {self.memory_bytes} registers_per_core_limit: 65536 registers_per_block_limit: 65536
            cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }} }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{self.device_kind}" """


# NVIDIA's data sheets and "CUDA C++ Programming Guide", table of compute capabilities; memory is what the driver leaves.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 85100068864, 2039e9, 312e12, 108, 167936, 2048, 64, 40 << 20, 1.41),
        Gpu("l4", "NVIDIA L4", (8, 9), 23034 << 20, 300e9, 121e12, 58, 102400, 1536, 128, 48 << 20, 2.04),
        Gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 84978434048, 3352e9, 989e12, 132, 233472, 2048, 128, 50 << 20, 1.98),
        Gpu("h200", "NVIDIA H200", (9, 0), 151397597184, 4800e9, 989e12, 132, 233472, 2048, 128, 50 << 20, 1.98),
        Gpu("b200", "NVIDIA B200", (10, 0), 191514411008, 7672e9, 2250e12, 148, 233472, 2048, 128, 126 << 20, 1.965),
    )
}


def gpu_devices(gpu: Gpu, number: int) -> tuple[Any, ...]:
    """So many of them in one host. Raises ConfigError where there is no compiler for them."""
    if not 1 <= number <= GPUS_OF_A_HOST:
        raise ConfigError(f"topology '{gpu.name}:{number}': a host has 1 to {GPUS_OF_A_HOST} GPUs")
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        raise ConfigError(REMEDY)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there need be no driver
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plugin
    shape = f"1x1x{number}"
    try:
        description = topologies.get_topology_desc(shape, "cuda", target_config=gpu.target_config(), topology=shape)
    except Exception as error:  # JAX raises whatever the plugin says
        raise ConfigError(f"topology '{gpu.name}:{number}' was refused by the compiler ({error})") from error
    return tuple(description.devices)
