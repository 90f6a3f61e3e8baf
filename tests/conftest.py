"""Set before anything imports JAX: eight CPU devices, so that sharding is tested anywhere."""

import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set its flags; find the plugin or import that did it")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from compile_cache import compiled_anew, compiled_once, compiled_quickly  # noqa: E402, F401
from hypothesis import settings  # noqa: E402

# Compiling makes single examples slow, so there is no deadline; failures must repeat, so nothing is drawn anew each run.
settings.register_profile("jaxllm", deadline=None, derandomize=True)
settings.load_profile("jaxllm")
