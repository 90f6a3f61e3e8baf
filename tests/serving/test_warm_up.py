"""Compiling at start: what is waited for, what goes on behind, and what is dropped."""

import gc
import subprocess
import sys
import threading
import time

import pytest
from golden_cases import MODELS, generated, golden

from jaxllm import LLM, SamplingParams
from jaxllm.serving.warm_up import WarmUp

pytestmark = pytest.mark.usefixtures("compiled_anew")
OPTIONS = dict(dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, page_size=4, max_model_len=96, skip_tokenizer_init=True)


class Compiler:
    def __init__(self):
        self.done, self.gate = [], threading.Event()

    def compile(self, key):
        if key == "slow":
            assert self.gate.wait(60)
        if key == "bad":
            raise ValueError("no such program")
        self.done.append(key)
        return f"program {key}"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_first_are_there_before_the_rest():
    compiler = Compiler()
    warm_up = WarmUp(["a", "b", "slow", "c"], compiler.compile, workers=1)
    seen = []
    warm_up.wait(["a", "b"], lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)] and warm_up.ready("a") and not warm_up.ready("slow") and not warm_up.ready("c")
    threading.Timer(0.05, compiler.gate.set).start()
    assert warm_up.get("c") == "program c" and compiler.done == ["a", "b", "slow", "c"]  # it waited
    warm_up.wait()
    assert warm_up.get("unknown") is None


def test_closing_drops_what_has_not_begun():
    compiler = Compiler()
    warm_up = WarmUp(["slow", "a"], compiler.compile, workers=1)
    wait_for(lambda: len(warm_up._todo) == 1)
    warm_up.close()
    compiler.gate.set()
    assert warm_up.get("slow") == "program slow" and warm_up.get("a") is None and not warm_up.ready("a")


def test_an_error_is_raised_where_the_program_is_needed():
    warm_up = WarmUp(["a", "bad", "b"], Compiler().compile, workers=2)
    warm_up.wait(["a", "b"])
    with pytest.raises(ValueError, match="no such program"):
        warm_up.get("bad")
    with pytest.raises(ValueError, match="no such program"):
        warm_up.wait()


def test_it_does_not_outlive_what_it_compiles_for():
    compiler = Compiler()
    gate = compiler.gate
    warm_up = WarmUp(["slow", "a"], compiler.compile, workers=1)
    wait_for(lambda: len(warm_up._todo) == 1)
    del compiler
    gate.set()
    assert warm_up.get("slow") == "program slow"
    gc.collect()
    wait_for(lambda: warm_up._futures["a"].done())
    # Which of the two came first, the next turn or the object's end, is open; either way nothing is left to do.
    assert not warm_up._todo


def test_an_engine_serves_while_it_compiles():
    ours = [{"prompt_token_ids": g["prompt"].tolist()} for g in golden("llama_gqa")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [tokens[:12] for tokens in generated("llama_gqa")]
    llm = LLM(MODELS / "llama_gqa", **OPTIONS, compilation_cache_dir="")
    runner = llm.engine.runner
    assert len(runner._ready_buckets()) < len(runner.buckets)  # it takes longer than this to compile them all
    for _ in range(3):
        assert [o.outputs[0].token_ids for o in llm.generate(ours, params)] == expected
    runner.finish_warm_up()
    assert runner._ready_buckets() == runner.buckets
    assert [o.outputs[0].token_ids for o in llm.generate(ours, params)] == expected
    assert runner.stats.compiles_after_warmup == 0
    waited = LLM(MODELS / "llama_gqa", **OPTIONS, warmup_in_background=False)
    assert waited.engine.runner._ready_buckets() == waited.engine.runner.buckets
    assert waited.engine.runner.stats.compiles == runner.stats.compiles


def test_a_process_ends_without_compiling_the_rest():
    code = f"""
from jaxllm import LLM
llm = LLM({str(MODELS / "llama_gqa")!r}, **{ {**OPTIONS, "max_num_seqs": 64, "max_num_batched_tokens": 512}!r}, compilation_cache_dir="")
import atexit
atexit.register(lambda: print(llm.engine.runner.stats.compiles, len(llm.engine.runner._warm_up._futures)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled, programs = map(int, done.stdout.split())
    assert compiled < programs
