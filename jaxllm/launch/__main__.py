"""The `jaxllm` command: finds the command, reads its configuration, runs it, and reports errors as people and programs need them.

Each command is a module of this folder with a frozen dataclass `Config` and `run(config) -> dict | None`; the dict is what
`--json` prints. Exit codes: 0 done, 1 failed, 2 wrong flags or configuration, 130 interrupted. JAXLLM_TRACEBACK=1 shows
where an error came from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from jaxllm.config import parse, unknown
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.launch.huge_pages import use_huge_pages

COMMANDS = {
    "generate": ("jaxllm.launch.generate", "Continue prompts with a model, streaming the text."),
    "chat": ("jaxllm.launch.chat", "Talk with a model in the terminal."),
    "serve": ("jaxllm.launch.serve", "Serve a model over HTTP, as OpenAI's API."),
    "run-batch": ("jaxllm.launch.run_batch", "Answer the requests of a file in OpenAI's batch form, without a server."),
    "convert": ("jaxllm.launch.convert", "Write a model as a Hugging Face safetensors folder."),
    "bench throughput": ("jaxllm.launch.bench.throughput", "Measure tokens a second over many requests at once."),
    "bench latency": ("jaxllm.launch.bench.latency", "Measure the time to the first token and between tokens."),
    "bench startup": ("jaxllm.launch.bench.startup", "Measure how long an engine takes to be ready."),
    "bench mixed": ("jaxllm.launch.bench.mixed", "Measure a load of every kind of request at once, and what it wastes."),
    "bench prefix": ("jaxllm.launch.bench.prefix", "Measure what requests that begin alike gain by sharing pages."),
    "bench schedule": ("jaxllm.launch.bench.schedule", "Measure what deciding who runs costs, under each policy."),
    "bench profile": ("jaxllm.launch.bench.profile", "Measure what this machine takes for a step, for the simulator."),
    "bench replay": ("jaxllm.launch.bench.replay", "Measure policies on a trace with the real engine, beside what the simulator says."),
    "bench structured": ("jaxllm.launch.bench.structured", "Check structured output under load, and measure what it costs a token."),
    "bench train": ("jaxllm.launch.bench.train", "Measure tokens a second of fine-tuning."),
    "bench serve": ("jaxllm.launch.bench.serve", "Measure any OpenAI-compatible server under load."),
    "compile": ("jaxllm.launch.compile", "Compile every program of an engine and write them to a folder, to start from."),
    "plan": ("jaxllm.launch.plan", "Tell whether a model fits TPUs or GPUs that are not here, and how fast they could serve it."),
    "kernels": ("jaxllm.launch.kernels", "Compile the attention kernels for chips that are not here, and list what compiles."),
    "tune-kernels": ("jaxllm.launch.tune_kernels", "Measure the attention kernels' best block sizes on this TPU or GPU."),
    "simulate": ("jaxllm.launch.simulate", "Run the scheduler without a device: serve a trace, or derive a recorded run's plans again."),
    "study": ("jaxllm.launch.study", "Compare scheduling policies over workloads, batch sizes and loads, without a device."),
    "sweep": ("jaxllm.launch.sweep", "Tell how much load each scheduling policy bears at equal latency, without a device."),
    "train": ("jaxllm.launch.train", "Fine-tune a model, all of it or an adapter."),
    "plot": ("jaxllm.launch.plot", "Draw what a training run told, as a PNG."),
    "doctor": ("jaxllm.launch.doctor", "Show versions, devices, memory, caches and settings, and check that the device computes."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and (arguments[:1] == ["train"] or arguments[:2] == ["bench", "train"]):
        use_huge_pages()
    as_json = "--json" in arguments  # known before parsing, for parsing may fail
    try:
        with _stdout_kept(as_json) as emit:
            try:
                result = _dispatch(arguments)
                sys.stdout.flush()  # a reader that went away (`| head`) shows here, where it is caught
            except Exception as error:
                code = 2 if isinstance(error, ConfigError) else 1
                _report(error)
                result = {"error": {"type": type(error).__name__, "message": str(error)}}
            else:
                code = 0
            if emit and result is not None:
                emit(result)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> dict | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    name, rest = arguments[0], arguments[1:]
    if any(command.startswith(f"{name} ") for command in COMMANDS):  # a command of two words
        if not rest or rest[0].startswith("-"):
            raise ConfigError(f"which one: {', '.join(command for command in COMMANDS if command.startswith(f'{name} '))}?")
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(f"jaxllm {version('jaxllm')}")
        return None
    if name.startswith("-"):
        raise ConfigError(f"`{name}` stands where a command should: jaxllm COMMAND {name} ...; see jaxllm --help")
    if name not in COMMANDS:
        raise ConfigError(unknown(name, list(COMMANDS), noun="command") + " See jaxllm --help")
    command = importlib.import_module(COMMANDS[name][0])
    try:
        rest = [getattr(command, "SHORT", {}).get(token, token) for token in rest]
        config = parse(command.Config, rest, prog=f"jaxllm {name}")
    except SystemExit:  # --help has printed its page
        return None
    if config.json != ("--json" in rest):
        raise ConfigError("json is a plain flag: write --json on the command line, without a value")
    return command.run(config)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: jaxllm COMMAND [--config FILE] [--key VALUE ...]", "", "Serve and fine-tune language models with JAX.", "", "commands:"]
        + rows
        + ["", "jaxllm COMMAND --help shows a command's flags. Every command takes --json."]
    )


def _report(error: Exception) -> None:
    """One clean line for what we raise on purpose; the whole traceback for what we did not foresee."""
    expected = isinstance(error, JaxLLMError)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has left. Python would complain once more while closing stdout, so that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif not expected or os.environ.get("JAXLLM_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)


@contextlib.contextmanager
def _stdout_kept(wanted: bool) -> Iterator:
    """Keeps the real stdout for one JSON line. Until then, what anyone writes there, C++ and child processes included,
    goes to stderr: hence the file descriptor as well as sys.stdout. Yields the function that writes the line, or None."""
    if not wanted:
        yield None
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def emit(result: dict) -> None:
        line = json.dumps(result, allow_nan=False) + "\n"
        with open(os.dup(real), "w", encoding="utf-8") as stdout:
            stdout.write(line)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield emit
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


if __name__ == "__main__":
    sys.exit(main())
