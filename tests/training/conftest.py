"""Tests of training compile each program once."""

from compile_cache import compiled_once  # noqa: F401
