"""Plans are read out of programs, which are compiled for that: one that comes out of a cache tells less."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _anew(compiled_anew):
    pass
