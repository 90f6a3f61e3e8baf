"""A cache of compiled programs that lives as long as a run of the tests: trainers of one shape compile one step between them."""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(scope="module", autouse=True)  # in a folder that is no Python package, "package" lasts to the end of the run
def compiled_once(tmp_path_factory):
    """For a folder whose conftest.py imports it; processes that its tests start, and other workers, share what was compiled. Does
    nothing where JAX was told of a cache."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    _set(folder, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(_SETTINGS, (folder, 0), strict=True):
            patch.setenv(name.upper(), str(value))
        yield
    _set(None, 1.0)


def _set(folder: Path | None, seconds: float) -> None:
    for name, value in zip(_SETTINGS, (folder and str(folder), seconds), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at these settings once
