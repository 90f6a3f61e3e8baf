"""The `--help` page of a configuration dataclass: its docstring, then every flag with its type, default and meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from itertools import takewhile
from pathlib import Path
from typing import Any

from jaxllm import config

LEFT = 34  # columns for the flag and its type; a longer one gets a line of its own


def help_text(cls: type, prog: str) -> str:
    """The whole page, wrapped to the terminal's width (at most 120 columns)."""
    width = min(shutil.get_terminal_size().columns, 120)
    word = "[MODEL] " if config.takes_model(cls) else ""
    lines = [f"usage: {prog} {word}[--config FILE] [--key VALUE ...]", "", *_paragraphs(cls.__doc__ or "", width), "", "options:"]
    lines += _row("-h, --help", "Show this page and stop.", width)
    lines += _row("--config FILE", "YAML file with these same keys; flags win over it. May be given several times.", width)
    lines += _rows(cls, "", None, width)
    return "\n".join(lines)


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string written below it in the source, or the strings of several lines; base classes included."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        is_text = lambda s: isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
        for i, statement in enumerate(body):
            texts = [line.value.value for line in takewhile(is_text, body[i + 1 :])]
            if isinstance(statement, ast.AnnAssign) and texts:
                docs[statement.target.id] = " ".join("".join(texts).split())
    return docs


def _rows(cls: type, prefix: str, base: Any, width: int) -> list[str]:
    """The flags of `cls`, then one block for each section below it. `base` holds the parent's defaults, if any."""
    lines, blocks, docs, kinds = [], [], field_docs(cls), config.kinds(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kind, default = kinds[field.name], config.default_of(field) if base is None else getattr(base, field.name)
        flag = "--" + (prefix + field.name).replace("_", "-")
        nested = config.section(kind)
        if nested:
            title = f"{flag[2:]}: {docs.get(field.name) or inspect.cleandoc(nested.__doc__ or '').partition(chr(10))[0]}"
            optional = " (absent unless one of its keys is given)" if default is None else ""
            inherited = default if isinstance(default, nested) else None
            blocks += ["", *textwrap.wrap(title + optional, width), *_rows(nested, prefix + field.name + ".", inherited, width)]
            continue
        left = f"{flag} {_metavar(kind)}".replace(" .KEY", ".KEY")
        lines += _row(left, f"{docs.get(field.name, '')} {_default_note(default)}".strip(), width)
    return lines + blocks


def _default_note(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "(required)"
    if default is None or default == () or default == [] or default == {} or default is False:
        return ""
    if isinstance(default, tuple | list):
        default = ",".join(str(item) for item in default)
    return f"(default: {str(default).lower() if isinstance(default, bool) else default})"


def _metavar(kind: Any) -> str:
    options = [option for option in config.choices(kind) if option is not type(None)]
    if options == [bool]:
        return "[true|false]"
    origin = typing.get_origin(options[0])
    if origin is dict:
        return f".KEY {_metavar(typing.get_args(options[0])[1])}"
    if origin in (tuple, list):
        items = [item for item in typing.get_args(options[0]) if item is not ...]
        if dataclasses.is_dataclass(items[0]):
            return "(a list, in a --config file)"
        text = items[0] in (str, Path)
        each = ",".join(_metavar(item) for item in items)
        return f"{each} (repeatable)" if text else each + ",..." * (len(items) == 1)
    return "|".join(word if typing.get_origin(option) else word.upper() for option in options if (word := config.describe(option)))


def _row(left: str, right: str, width: int) -> list[str]:
    column = "  " + left
    wrapped = textwrap.wrap(right, max(width - LEFT, 30)) or [""]
    if len(column) > LEFT - 2:
        return [column, *((" " * LEFT + line).rstrip() for line in wrapped if line)]
    return [(column.ljust(LEFT) + wrapped[0]).rstrip(), *(" " * LEFT + line for line in wrapped[1:])]


def _paragraphs(text: str, width: int) -> list[str]:
    """Paragraphs are wrapped; indented ones (examples) are kept as written."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        keep = paragraph.startswith("  ")
        lines += [*(paragraph.splitlines() if keep else textwrap.wrap(paragraph, width)), ""]
    return lines[:-1]
