"""`jaxllm doctor`: what is installed, what hardware it sees, and whether the device computes."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxllm.launch.command import Command

PACKAGES = (
    "jaxllm jax jaxlib flax numpy ml_dtypes safetensors tokenizers sentencepiece gguf jinja2 huggingface_hub libtpu "
    "jax-cuda12-plugin jax-cuda13-plugin optax orbax-checkpoint grain fastapi uvicorn"
).split()
CPU_FLAGS = "avx2 fma f16c avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 asimd asimddp i8mm bf16 sve".split()
VARIABLES = tuple("XLA_ JAX_ JAXLLM_ HF_ LIBTPU_ TPU_ CUDA_VISIBLE_DEVICES NVIDIA_ NCCL_ OMP_NUM_THREADS SLURM_JOB_ID".split())
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|(^|_)KEY(_|$)")
MATMUL_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Config(Command):
    """Show versions, devices, memory, caches and the settings that matter, and multiply matrices for a second.

    Values of variables that may hold secrets are never shown, so the output can go into a bug report.
    """


def run(config: Config) -> dict[str, Any]:
    """Gathers the report and prints it as tables; the returned dict has the same facts."""
    report: dict[str, Any] = {"versions": versions(), "host": host(), "caches": caches(), "environment": environment(os.environ)}
    try:
        report |= {"devices": devices(), "matmul": matmul(), "device_error": None}
    except Exception as error:  # a driver or plugin that does not start (JAX raises anything): to be reported, not to stop at
        report |= {"devices": [], "matmul": None, "device_error": f"{type(error).__name__}: {error}".rstrip(": ")}
    if not config.json:
        _print(report)
    return report


def versions() -> dict[str, str | None]:
    """Package -> version; None when not installed (most are optional)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def host() -> dict[str, Any]:
    """Operating system, cores this process may use, vector instructions, and memory in bytes (None where not told)."""
    memory = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.M)}
    named = re.search(r"^(?:flags|Features)\s*:(.*)$", _text("/proc/cpuinfo"), re.M)
    flags = set(named[1].split()) if named else set()
    limit = _text("/sys/fs/cgroup/memory.max").strip()  # a container's limit can be far below the host's memory
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "memory_limit_bytes": int(limit) if limit.isdigit() else None,
    }


def devices() -> list[dict[str, Any]]:
    """What JAX computes on. Memory in bytes; None where the device does not tell, as CPUs do not."""
    import jax

    found = []
    for device in jax.devices():
        stats = device.memory_stats() or {}
        found.append(
            {
                "id": device.id,
                "platform": device.platform,
                "kind": device.device_kind,
                "process": device.process_index,
                "memory_bytes": stats.get("bytes_limit"),
                "memory_used_bytes": stats.get("bytes_in_use"),
            }
        )
    return found


def caches() -> dict[str, dict[str, Any]]:
    """The folders that fill up: name -> path, and bytes (None when it does not exist)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from jaxllm.paths import cache_dir

    folders = {"jaxllm": cache_dir(), "hugging face hub": Path(HF_HUB_CACHE)}
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folders["jax compilation"] = Path(compiled)
    return {name: {"path": str(path), "bytes": _folder_bytes(path)} for name, path in folders.items()}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what jaxllm, JAX and the hub do, secrets hidden."""
    shown = {name: value for name, value in sorted(variables.items()) if name.startswith(VARIABLES)}
    # A user name and password inside an address are a secret too.
    return {name: "(set, hidden)" if SECRET.search(name) else re.sub(r"//[^/@\s]+@", "//(hidden)@", shown[name]) for name in shown}


def matmul() -> dict[str, Any]:
    """Multiplies on the default device for about a second: does it agree with NumPy, and how fast is it?"""
    import jax
    import jax.numpy as jnp
    import numpy as np

    a, b = (np.random.default_rng(i).standard_normal((MATMUL_SIZE, MATMUL_SIZE)).astype(np.float32) for i in (0, 1))
    report: dict[str, Any] = {"size": MATMUL_SIZE, "device": str(jax.devices()[0])}
    for name, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        x, y = jnp.asarray(a, name), jnp.asarray(b, name)
        multiply = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest" if x.dtype == jnp.float32 else None))
        out = multiply(x, y).block_until_ready()
        error = float(np.abs(np.asarray(out, np.float32) - a @ b).max() / np.abs(a @ b).max())
        runs, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.5:
            multiply(x, y).block_until_ready()
            runs += 1
        rate = 2 * MATMUL_SIZE**3 * runs / (time.perf_counter() - start)
        report[name] = {"gflop_per_s": rate / 1e9, "relative_error": error, "ok": error < tolerance}
    return report


def _text(path: str) -> str:
    """A file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _folder_bytes(folder: Path) -> int | None:
    """Bytes below a folder, each file once: hub snapshots are links to blobs."""
    if not folder.is_dir():
        return None
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # another process is at work in the cache
                continue
    return total


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        view = Table(*columns, title=title, title_justify="left", show_header=len(columns) > 2)
        for row in rows:
            view.add_row(*map(Text, row))  # Text: brackets in a value are no markup
        console.print(view)

    host, multiplied = report["host"], report["matmul"]
    table("Versions", ("", ""), [(name, version or "not installed") for name, version in report["versions"].items()])
    memory = f"{_size(host['memory_available_bytes'])} free of {_size(host['memory_bytes'])}"
    if host["memory_limit_bytes"]:
        memory += f", limited to {_size(host['memory_limit_bytes'])}"
    rows = [("system", host["system"]), ("cpus", str(host["cpus"])), ("cpu flags", " ".join(host["cpu_flags"])), ("memory", memory)]
    table("Host", ("", ""), rows)
    rows = [(str(d["id"]), d["platform"], d["kind"], _size(d["memory_used_bytes"]), _size(d["memory_bytes"])) for d in report["devices"]]
    table("Devices", ("id", "platform", "kind", "used", "memory"), rows)
    table("Caches", ("", "path", "size"), [(name, c["path"], _size(c["bytes"])) for name, c in report["caches"].items()])
    table("Environment", ("", ""), list(report["environment"].items()) or [("(nothing set)", "")])
    if report["device_error"]:
        console.print(Text(f"JAX cannot use its device: {report['device_error']}", style="bold red"))
        return
    rows = []
    for name in ("float32", "bfloat16"):
        result = multiplied[name]
        verdict = "ok" if result["ok"] else f"WRONG: off by {result['relative_error']:.1%}; check the driver and plugin versions"
        rows.append((name, f"{result['gflop_per_s']:,.0f} GFLOP/s", verdict))
    table(f"{multiplied['size']}x{multiplied['size']} product on {multiplied['device']}", ("dtype", "speed", "result"), rows)
