"""Packages whose names are imported when they are used, so that a command's settings and help need not wait for JAX."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(package: str, **modules: tuple[str, ...]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` (PEP 562) of a package that re-exports from its modules: lazy(__name__, config=("LoraConfig",))."""
    homes = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return sorted(homes), getattr_
