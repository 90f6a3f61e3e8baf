"""`jaxllm chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import JaxLLMError
from jaxllm.launch.command import ModelCommand, load_model, sampling_params

HELP = """/system TEXT  set the system message and start over (without TEXT: remove it)
/reset        forget the conversation
/help         this list
/exit         leave (so does Ctrl-D)
Ctrl-C stops an answer; what was said of it stays in the conversation."""


@dataclass(frozen=True, kw_only=True)
class Config(ModelCommand):
    """Talk with a model in the terminal, with streaming and history; /help lists what you can type.

    Reads stdin line by line, so a script can be piped in. With --json: model and messages, when the conversation ends.
    """

    system: str | None = None
    "The system message."


def run(config: Config) -> dict[str, Any]:
    """Talks until /exit or the end of stdin; returns the conversation."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (importing it gives input() line editing and history)

    params = sampling_params(config)
    llm = load_model(config, max_num_seqs=1, warmup=True)
    if interactive:
        print(f"{config.model} is ready; /help lists commands.", file=sys.stderr)
    messages = _fresh(config.system)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
            continue
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        elif command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
            print("(conversation forgotten)", file=sys.stderr)
        elif command == "/system":
            messages = _fresh(rest.strip() or None)
            print("(system message set; conversation forgotten)", file=sys.stderr)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/") and "/" not in command[1:]:
            print(f"unknown command {command}; /help lists them", file=sys.stderr)
        elif line:
            messages = _turn(llm, params, messages, line)
    return {"model": config.model, "messages": messages}


def _fresh(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system is not None else []


def _turn(llm: Any, params: Any, messages: list[dict[str, str]], line: str) -> list[dict[str, str]]:
    """Streams the answer; returns the longer conversation. A refused request (too long, say) leaves it as it was."""
    asked = [*messages, {"role": "user", "content": line}]
    answer, stream = "", None
    try:
        stream = llm.stream({"prompt_token_ids": llm.get_tokenizer().apply_chat_template(asked, add_generation_prompt=True)}, params)
        for output in stream:
            text = output.outputs[0].text
            print(text[len(answer) :], end="", flush=True)
            answer = text
        print()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except JaxLLMError as error:
        print(f"error: {error} (/reset forgets the conversation so far)", file=sys.stderr)
        return messages
    finally:
        if stream is not None:
            stream.close()  # tells the engine to drop the request, should it still run
    return [*asked, {"role": "assistant", "content": answer}]
