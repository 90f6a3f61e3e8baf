"""`jaxllm kernels`; what it compiles is looked at in test_guards.py for TPUs, and in tests/gpu_aot for GPUs."""

import re

import jax
import pytest

from jaxllm.launch.__main__ import main
from jaxllm.planning.kernels import DTYPES, HEAD_DIMS, PAGE_SIZES, KernelCase, all_cases, some_cases


def test_what_is_compiled():
    some, every = set(some_cases()), set(all_cases())
    assert some <= every and len(every) > 800
    for field, values in (("head_dim", HEAD_DIMS), ("dtype", DTYPES), ("page_size", PAGE_SIZES), ("sinks", (False, True))):
        assert {getattr(case, field) for case in some} == set(values)
    assert str(KernelCase(head_dim=80, sinks=True)) == "bfloat16 8:2 x 80, pages of 64, sinks, mixed"


@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "chip"),
        (["--chip", "v6"], "did you mean v6e"),
        (["--chip", "v6e", "--threads", "0"], "threads"),
        (["--chip", "v6e", "--markdown", "none/page.md"], "none is no folder"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert main(["kernels", *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_a_chip_cannot_do_is_said(monkeypatch, capsys, tmp_path):
    """Pages of 8 are less than a TPU's tile of bfloat16."""
    from jaxllm.planning import Topology, chips

    monkeypatch.setattr("jaxllm.planning.find_topology", lambda name: Topology(name, chips.CHIPS["v6e"], ()))
    monkeypatch.setattr("jaxllm.planning.kernels.some_cases", lambda: [KernelCase(page_size=8)])
    page = tmp_path / "page.md"
    page.write_text("# Kernels\n\n<!-- jaxllm kernels --chip v6e -->\nold\n<!-- end -->\n\nMore.\n")
    monkeypatch.setattr("jaxllm.planning.kernels.all_cases", lambda: [KernelCase(page_size=8), KernelCase(page_size=8, sinks=True)])
    for flags in ([], [], ["--every"]):
        assert main(["kernels", "--chip", "v6e", "--markdown", str(page), *flags]) == 0
        assert "xla: v6e: page_size 8 is not a multiple of 16" in capsys.readouterr().out
    before, table, between, summary, after = re.split(
        "<!-- jaxllm kernels --chip v6e -->|<!-- end -->|<!-- .* --every -->", page.read_text()
    )
    assert (before, between.strip(), after) == ("# Kernels\n\n", "More.", "\n")
    assert "| bfloat16 8:2 x 128, pages of 8, mixed | xla |" in table and "old" not in table
    assert "| bfloat16 x 128 | 0 of 2, 2 xla |" in summary and "page_size 8 is not a multiple of 16" in summary


def test_what_does_not_compile_is_a_failure(monkeypatch, capsys):
    from jaxllm.planning import Topology, chips

    monkeypatch.setattr("jaxllm.planning.find_topology", lambda name: Topology(name, chips.CHIPS["v6e"], tuple(jax.devices())))
    monkeypatch.setattr("jaxllm.planning.kernels.some_cases", lambda: [KernelCase()])  # TPU kernels, but devices of a CPU
    assert main(["kernels", "--chip", "v6e"]) == 1
    assert "1 of 1 did not compile as they should, the first bfloat16 8:2 x 128" in capsys.readouterr().err
