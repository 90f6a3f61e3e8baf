"""How programs are compiled in tests. Most of the suite's time was compiling: the same programs again and again, and with all of LLVM's
optimisation for models that compute for milliseconds."""

import contextlib
import os
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

_NO_CACHE = dict(jax_compilation_cache_dir=None, jax_persistent_cache_min_compile_time_secs=1.0)


class _settings:
    """JAX's settings, here and in processes that are started meanwhile; those of before, after it."""

    def __init__(self, **values):
        self._new = values

    def __enter__(self) -> None:
        self._old = {name: jax.config.values[name] for name in self._new}
        self._environment = pytest.MonkeyPatch()
        for name, value in self._new.items():
            if value is None:
                self._environment.delenv(name.upper(), raising=False)
            else:
                self._environment.setenv(name.upper(), str(value))
        _configure(self._new)

    def __exit__(self, *_) -> None:
        self._environment.undo()
        _configure(self._old)


def _configure(values: dict) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at where it is once


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """A cache of compiled programs that lasts as long as the run: whoever needs a program first compiles it, for all workers and for the
    processes that tests start. Not where JAX was told of a cache."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    # Else JAX leaves out what compiles within a second.
    with _settings(jax_compilation_cache_dir=str(folder), jax_persistent_cache_min_compile_time_secs=0.0):
        yield


@pytest.fixture(scope="module")
def compiled_anew(compiled_once) -> Iterator[None]:
    """For modules about compiling itself, or about what is kept of it: with JAX's cache on, the engine keeps no programs of its own
    (`executables.py`), and `compile` refuses to make a bundle."""
    with _settings(**_NO_CACHE):
        yield


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """The same programs from XLA, but LLVM leaves out what costs it time, which is half of the whole. `make test-all`
    (JAXLLM_TEST_OPTIMIZED) has them optimised."""
    if not os.environ.get("JAXLLM_TEST_OPTIMIZED"):
        with _settings(jax_disable_most_optimizations=True):
            yield
        jax.clear_caches()  # whoever comes next has nothing of it
    else:
        yield


@pytest.fixture(scope="module")
def compiled_quickly(compiled_once) -> Iterator[None]:
    """For modules about what is done with a model, and not about its numbers. (What a session's fixture compiles comes before it.)"""
    with quickly():
        yield
