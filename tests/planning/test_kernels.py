"""Kernels compiled for TPUs that are not here; those for GPUs are in tests/gpu_aot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.launch.__main__ import main
from jaxllm.planning.kernels import DTYPES, HEAD_DIMS, PAGE_SIZES, KernelCase, all_cases, some_cases

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import dataclasses, json, sys
from jaxllm.planning import find_topology
from jaxllm.planning.kernels import KernelCase, compile_kernels
cases = [KernelCase(**case) for case in json.loads(sys.argv[2])]
print(json.dumps([dataclasses.asdict(report) for report in compile_kernels(find_topology(sys.argv[1]), cases)]))
"""


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_heads_narrower_than_lanes_make_no_copy_of_the_cache(topology):
    pytest.importorskip("libtpu")
    cases = [{"head_dim": 64, "decode_only": True}, {"head_dim": 80, "window": 1000, "softcap": 30.0, "sinks": True}]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, topology, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=environment)
    assert done.stdout, done.stderr
    for report in json.loads(done.stdout.splitlines()[-1]):
        assert report["problem"] is None and report["implementation"] == "tpu" and report["temporaries"] < 2**24


def test_what_is_compiled():
    some, every = set(some_cases()), set(all_cases())
    assert some <= every and len(every) > 800
    for field, values in (("head_dim", HEAD_DIMS), ("dtype", DTYPES), ("page_size", PAGE_SIZES), ("sinks", (False, True))):
        assert {getattr(case, field) for case in some} == set(values)
    assert str(KernelCase(head_dim=80, sinks=True)) == "bfloat16 8:2 x 80, pages of 64, sinks, mixed"


@pytest.mark.parametrize(
    "flags,message", [([], "chip"), (["--chip", "v6"], "did you mean v6e"), (["--chip", "v6e", "--threads", "0"], "threads")]
)
def test_wrong_flags(flags, message, capsys):
    assert main(["kernels", *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_a_chip_cannot_do_is_said(monkeypatch, capsys):
    """Pages of 8 are less than a TPU's tile of bfloat16."""
    from jaxllm.planning import Topology, chips

    monkeypatch.setattr("jaxllm.planning.find_topology", lambda name: Topology(name, chips.CHIPS["v6e"], ()))
    monkeypatch.setattr("jaxllm.planning.kernels.some_cases", lambda: [KernelCase(page_size=8)])
    assert main(["kernels", "--chip", "v6e"]) == 0
    assert "xla: v6e: page_size 8 is not a multiple of 16" in capsys.readouterr().out


def test_what_does_not_compile_is_a_failure(monkeypatch, capsys):
    from jaxllm.planning import Topology, chips

    monkeypatch.setattr("jaxllm.planning.find_topology", lambda name: Topology(name, chips.CHIPS["v6e"], tuple(jax.devices())))
    monkeypatch.setattr("jaxllm.planning.kernels.some_cases", lambda: [KernelCase()])  # TPU kernels, but devices of a CPU
    assert main(["kernels", "--chip", "v6e"]) == 1
    assert "1 of 1 did not compile as they should, the first bfloat16 8:2 x 128" in capsys.readouterr().err
