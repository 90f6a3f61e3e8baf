"""jaxllm and its peers doing the same work on one machine, a run of each in turn, so that the machine's moods hit all alike.

    python benchmarks/in_turn.py MODEL --peer vllm=PATH/TO/PYTHON --peer hf=PATH/TO/PYTHON [--rounds 5] [--work 1x128x128 ...]

Each system lives in a process of its own, which is stopped (SIGSTOP) while another runs. Work is REQUESTSxINPUTxOUTPUT: random
token ids, greedy, past any end of sequence, no prefix cache. The first run of each shape does not count. Prints a line of JSON a
run, and at the end the medians and jaxllm's speed as a multiple of each peer's.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time

DTYPES = {"vllm": "bfloat16", "hf": "bfloat16"}
CONTEXT = 2048


def jaxllm_system(model, works, dtype):
    from jaxllm import LLM, SamplingParams

    options = dict(dtype=dtype, max_model_len=CONTEXT, enable_prefix_caching=False, skip_tokenizer_init=True, warmup=False)
    engines = {n: LLM(model, max_num_seqs=n, **options) for n in {n for n, _, _ in works}}

    def run(prompts, output_len):
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        return sum(len(o.outputs[0].token_ids) for o in engines[len(prompts)].generate(_ids(prompts), params))

    return run


def vllm_system(model, works, dtype):
    # One engine for all its work, as bench_vllm.py of the peers does.
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    seqs = max(64, *(n for n, _, _ in works))
    llm = LLM(model, dtype=dtype, max_model_len=CONTEXT, max_num_seqs=seqs, enable_prefix_caching=False)

    def run(prompts, output_len):
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(_ids(prompts), params, use_tqdm=False))

    return run


def hf_system(model, works, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(prompts, output_len):
        ids = torch.tensor(prompts)
        lengths = dict(max_new_tokens=output_len, min_new_tokens=output_len)
        with torch.inference_mode():
            out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2, **lengths)
        return out.shape[0] * (out.shape[1] - ids.shape[1])

    return run


SYSTEMS = {"jaxllm": jaxllm_system, "vllm": vllm_system, "hf": hf_system}


def _ids(prompts):
    return [{"prompt_token_ids": p} for p in prompts]


def serve(name, model, works, dtype):
    """A system's own process: for each line `requests input output seed` on stdin, the work, and a line of JSON on stdout."""
    import numpy as np

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    start = time.perf_counter()
    run = SYSTEMS[name](model, works, dtype)
    print(json.dumps({"ready_s": round(time.perf_counter() - start, 1)}), file=answers, flush=True)
    for line in sys.stdin:
        n, input_len, output_len, seed = map(int, line.split())
        prompts = np.random.default_rng(seed).integers(100, 40000, (n, input_len)).tolist()
        start = time.perf_counter()
        made = run(prompts, output_len)
        seconds = time.perf_counter() - start
        assert made == n * output_len, f"{name} made {made} tokens of {n * output_len}"
        print(json.dumps({"seconds": round(seconds, 3)}), file=answers, flush=True)


class Worker:
    """A system in its own process, stopped except while it works."""

    def __init__(self, name, python, model, works, dtype):
        command = [python, __file__, model, "--serve", name, "--dtype", dtype, "--work", *("x".join(map(str, w)) for w in works)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready_s = self._answer()["ready_s"]
        self.process.send_signal(signal.SIGSTOP)

    def run(self, work, seed):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(" ".join(map(str, (*work, seed))) + "\n")
        self.process.stdin.flush()
        seconds = self._answer()["seconds"]
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self):
        self.process.kill()

    def _answer(self):
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{' '.join(self.process.args[:2])} ended with {self.process.wait()}: what it said is above")
        return json.loads(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="vllm or hf, and the Python that has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs="+", default=["1x128x128", "1x1024x1", "8x128x128", "32x128x128", "64x128x128"])
    parser.add_argument("--dtype", default="auto", help="jaxllm's; auto is float32 on a CPU")
    parser.add_argument("--serve", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    works = [tuple(map(int, w.split("x"))) for w in arguments.work]
    if arguments.serve:
        return serve(arguments.serve, arguments.model, works, arguments.dtype)
    pythons = {"jaxllm": sys.executable} | dict(peer.split("=", 1) for peer in arguments.peer)
    workers = {}
    try:
        for name, python in pythons.items():
            dtype = DTYPES.get(name, arguments.dtype)
            workers[name] = Worker(name, python, arguments.model, works, dtype)
            print(json.dumps({"system": name, "dtype": dtype, "ready_s": workers[name].ready_s}), flush=True)
        for work in works:
            measure(work, workers, arguments.rounds)
    finally:
        for worker in workers.values():
            worker.close()


def measure(work, workers, rounds):
    taken = {name: [] for name in workers}
    for seed in range(rounds + 1):
        for name, worker in workers.items():
            seconds = worker.run(work, seed)
            if seed:
                taken[name].append(seconds)
                print(json.dumps({"work": "x".join(map(str, work)), "system": name, "seconds": seconds}), flush=True)
    n, input_len, output_len = work
    tokens = n * output_len if output_len > 1 else n * input_len  # one token out: it is the prompt that is timed
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    speeds = {name: round(tokens / median, 1) for name, median in medians.items()}
    ratios = {name: round(medians[name] / medians["jaxllm"], 2) for name in medians if name != "jaxllm"}
    print(json.dumps({"work": "x".join(map(str, work)), "tokens_per_s": speeds, "times_as_fast_as": ratios}), flush=True)


if __name__ == "__main__":
    main()
