"""jaxllm's server and vLLM's under the same requests (`jaxllm bench serve`), one server working at a time; without
prefix caches, as each round brings prompts of the one before.

    python benchmarks/serve_in_turn.py MODEL --vllm PATH/TO/PYTHON [--rates 2 4 inf] [--rounds 2] [-- FLAGS OF bench serve ...]

Both servers are started once and stopped (SIGSTOP, the whole process group) while the other one answers. Prints a line of JSON a run,
and at the end of each rate the medians and jaxllm's as ratios to vLLM's: of throughput more is better, of times less.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

KEYS = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_tpot_ms")
CONTEXT, PLACES = 2048, 64


def command(name: str, python: str, model: str, port: int) -> list[str]:
    common = ["--model", model, "--port", str(port), "--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(PLACES)]
    common += ["--served-model-name", "m"]
    if name == "jaxllm":
        return [python, "-m", "jaxllm.launch", "serve", *common, "--enable-prefix-caching", "false"]
    return [python, "-m", "vllm.entrypoints.openai.api_server", *common, "--no-enable-prefix-caching"]


class Server:
    def __init__(self, name: str, python: str, model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        more = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"}
        self.log = Path(f"{name}-server.log").open("w")
        environment = os.environ | (more if name == "vllm" else {})
        self.process = subprocess.Popen(
            command(name, python, model, port), stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        started = time.perf_counter()
        try:
            while not self._answers():
                if self.process.poll() is not None or time.perf_counter() > started + 600:
                    raise SystemExit(f"{name}'s server ended, or did not start in ten minutes: see {self.log.name}")
                time.sleep(0.5)
        except BaseException:  # Ctrl-C does not reach a session of its own
            self.kill()
            raise
        self.ready_s = time.perf_counter() - started
        self.signal(signal.SIGSTOP)

    def _answers(self) -> bool:
        try:
            return urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def bench(self, flags: list[str]) -> dict:
        self.signal(signal.SIGCONT)
        asked = [sys.executable, "-m", "jaxllm.launch", "bench", "serve", "--base-url", self.url, "--json", *flags]
        done = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        self.signal(signal.SIGSTOP)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--vllm", required=True, help="the Python that has it")
    parser.add_argument("--rates", nargs="+", default=["2", "4", "inf"], help="requests a second")
    parser.add_argument("--rounds", type=int, default=2)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    servers = {}
    try:
        for name, python in (("jaxllm", sys.executable), ("vllm", a.vllm)):
            servers[name] = Server(name, python, a.model)
            print(json.dumps({"server": name, "ready_s": round(servers[name].ready_s, 1)}), flush=True)
        for rate in a.rates:
            measure(servers, rate, a.rounds, flags)
    finally:
        for server in servers.values():
            server.kill()


def measure(servers: dict[str, Server], rate: str, rounds: int, flags: list[str]) -> None:
    seen = {name: [] for name in servers}
    for seed in range(rounds):
        for name, server in servers.items():
            result = server.bench(["--request-rate", rate, "--seed", str(seed), *flags])
            figures = {key: round(result[key], 2) for key in (*KEYS, "completed", "failed")}
            seen[name].append(figures)
            print(json.dumps({"rate": rate, "server": name, **figures}), flush=True)
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in KEYS} for name, runs in seen.items()}
    ratios = {key: round(medians["jaxllm"][key] / medians["vllm"][key], 2) for key in KEYS}
    print(json.dumps({"rate": rate, "medians": medians, "jaxllm_by_vllm": ratios}), flush=True)


if __name__ == "__main__":
    main()
