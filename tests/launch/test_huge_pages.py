"""Training starts itself again with huge pages, where they help."""

import os
import subprocess
import sys

import pytest

from jaxllm.launch import huge_pages
from jaxllm.launch.huge_pages import with_huge_pages

MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    "environ, mode, libc, tunables",
    [
        ({}, MADVISE, "glibc 2.35", "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, MADVISE, "glibc 2.36", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, MADVISE, "glibc 2.36", None),  # who says no is heard
        ({}, "[always] madvise never\n", "glibc 2.36", None),
        ({}, "always madvise [never]\n", "glibc 2.36", None),
        ({}, MADVISE, "glibc 2.34", None),
        ({}, MADVISE, "NPTL 2.36", None),
        ({}, MADVISE, None, None),
    ],
)
def test_when_they_are_asked_for(environ, mode, libc, tunables):
    assert with_huge_pages(environ, mode, libc) == tunables


@pytest.mark.skipif(
    not huge_pages._MODE.exists() or with_huge_pages({}, huge_pages._MODE.read_text(), os.confstr("CS_GNU_LIBC_VERSION")) is None,
    reason="this system gives huge pages to all processes or to none",
)
def test_a_process_starts_again_once_with_its_arguments():
    code = "import os, sys; from jaxllm.launch.huge_pages import use_huge_pages as use; print('start', flush=True); use(); "
    code += "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.Popen([sys.executable, "-c", code, "a b", "--c=d"], env=environ, stdout=subprocess.PIPE, text=True)
    out = process.communicate(timeout=60)[0].splitlines()
    assert out == ["start", "start", f"{process.pid} glibc.malloc.hugetlb=1 ['a b', '--c=d']"]
