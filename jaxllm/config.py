"""Configuration: one tree of frozen dataclasses, written in YAML or on the command line.

A component's settings are a frozen dataclass that checks itself in `__post_init__` (raising ConfigError) and documents
each field with a string below it. From that one description come the YAML reader, the flags and the help page:

    @dataclass(frozen=True)
    class Optimizer:
        "How the weights move."

        learning_rate: float = 1e-4
        "Peak rate, after the warm-up."

    @dataclass(frozen=True)
    class Train:
        "Fine-tune a model."

        model: str
        "Folder, hub name or `demo`."
        optimizer: Optimizer = Optimizer()

    parse(Train, ["--config", "run.yaml", "--optimizer.learning-rate", "2e-5"], prog="jaxllm train")

On the command line: hyphens and underscores mean the same; `--flag` and `--no-flag` set a boolean; a list of text takes one
item per flag (`--stop A --stop B`), a list of numbers is written `0.9,0.95`; `null` clears an optional value; a scalar given
twice has its last value. A list on the command line replaces the file's. Several `--config` files are merged in order.

Types understood: str, int, float, bool, Path, Literal, tuples and lists, dict[str, ...], dataclasses, and `... | None`.
jsonargparse and tyro were tried on this contract and met half of it each; both need `from_dict` beside them anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from jaxllm.errors import ConfigError


def from_dict[Config](cls: type[Config], mapping: Mapping[str, Any], where: str = "") -> Config:
    """Builds `cls` from a nested mapping. `where` (a file's name) begins every error. Raises ConfigError."""
    return _build(cls, _checked(cls, mapping, where), where)


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as YAML and JSON can hold it (tuples become lists, paths text); `from_dict` turns it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping; an empty file is an empty mapping. Raises ConfigError, also for a key written twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML itself lets the last of two equal keys win, silently."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise ConfigError(f"{path}: line {key.start_mark.line + 1}: key `{key.value}` is written twice; keep one")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this configuration file ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {line}not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {_shown(tree)}")
    return tree


def parse[Config](cls: type[Config], argv: Sequence[str], prog: str) -> Config:
    """Builds `cls` from command-line arguments and the `--config` files they name; the command line wins.

    `-h` and `--help` print the help page and raise SystemExit(0). Raises ConfigError.
    """
    if any(token in ("-h", "--help") for token in argv):
        from jaxllm.config_help import help_text

        print(help_text(cls, prog))
        raise SystemExit(0)
    files, flags = _read_flags(cls, list(argv))
    tree: dict[str, Any] = {}
    for file in files:
        tree = _merge(tree, _checked(cls, load_yaml(file), str(file)))
    # With both, a value that the dataclass refuses may be either's: then no file is blamed.
    return _build(cls, _merge(tree, flags), "" if flags else ", ".join(files))


# --- From values to a tree of the right types ------------------------------------------------------------------------


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """Field name -> type, of the fields that the constructor takes."""
    hints = typing.get_type_hints(cls)
    found = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    for name, kind in found.items():
        if len([option for option in choices(kind) if dataclasses.is_dataclass(option)]) > 1:
            raise TypeError(f"{cls.__name__}.{name}: a choice between several dataclasses cannot be read; make each an optional field")
    return found


def section(kind: Any) -> type | None:
    """The dataclass in `kind`, when kind is a dataclass or `dataclass | None`."""
    nested = [option for option in choices(kind) if dataclasses.is_dataclass(option)]
    return nested[0] if len(nested) == 1 else None


def describe(kind: Any) -> str:
    """The type in a user's words: `int`, `text or null`, `list of float`, `auto|float32`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if len(choices(kind)) > 1:
        return " or ".join(describe(option) for option in choices(kind))
    if origin is Literal:
        return "|".join(str(option) for option in arguments)
    if origin in (tuple, list):
        items = [describe(item) for item in arguments if item is not ...]
        return f"list of {items[0]}" if origin is list or ... in arguments else f"[{', '.join(items)}]"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "section of keys"
    return {str: "text", Path: "path", types.NoneType: "null", Any: "value"}.get(kind) or kind.__name__


def choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its own only choice."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _checked(cls: type, mapping: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """`mapping` with known keys only and converted values; nothing is filled in yet, so that sources can be merged."""
    if not isinstance(mapping, Mapping):
        raise _wrong(mapping, cls, where, prefix.rstrip("."))
    tree: dict[str, Any] = {}
    for given, value in mapping.items():
        name = str(given).replace("-", "_")
        if name not in kinds(cls):
            raise ConfigError(_prefixed(where, unknown(prefix + str(given), _paths(cls, prefix))))
        if name in tree:
            raise ConfigError(_prefixed(where, f"key `{prefix}{name}` is written twice, once with hyphens; keep one"))
        tree[name] = _convert(value, kinds(cls)[name], where, prefix + name)
    return tree


def _convert(value: Any, kind: Any, where: str, key: str) -> Any:
    """`value` (from YAML, or text from a flag) as `kind`; a section stays a dict. Raises ConfigError."""
    origin, arguments, options = typing.get_origin(kind), typing.get_args(kind), choices(kind)
    if len(options) > 1:
        if value is None or (value == "null" and types.NoneType in options):
            return None if types.NoneType in options else _fail(value, kind, where, key)
        if nested := section(kind):
            return _convert(value, nested, where, key)
        # Exactly fitting types first: for `int | str` a file's "3" is text and its 3 a number.
        for option in sorted(options, key=lambda option: (type(value) is not option, option is str)):
            with contextlib.suppress(ConfigError):
                return _convert(value, option, where, key)
        return _fail(value, kind, where, key)
    if dataclasses.is_dataclass(kind):
        return _checked(kind, to_dict(value) if isinstance(value, kind) else value, where, key + ".")
    if origin is Literal:
        for option in arguments:
            if value == str(option) or (value == option and type(value) is type(option)):
                return option
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        items = arguments[:1] * len(value) if origin is list or ... in arguments else arguments
        if len(items) == len(value):
            return origin(_item(v, item, where, f"{key}[{i}]") for i, (v, item) in enumerate(zip(value, items, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {str(name): _item(item, arguments[1], where, f"{key}.{name}") for name, item in value.items()}
    elif kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    elif kind in (int, float) and isinstance(value, (str, int) if kind is int else (str, int, float)) and not isinstance(value, bool):
        try:
            return kind(value)
        except ValueError:
            pass
    elif kind in (str, Path) and isinstance(value, str | Path):
        return kind(value)
    elif kind is Any:
        return value
    return _fail(value, kind, where, key)


def _item(value: Any, kind: Any, where: str, key: str) -> Any:
    """As _convert, but an item of a list or dict is never merged with anything, so a section is built at once."""
    value = _convert(value, kind, where, key)
    nested = section(kind)
    return _build(nested, value, where, key + ".") if nested and isinstance(value, dict) else value


def _build[Config](cls: type[Config], tree: Mapping[str, Any], where: str, prefix: str = "", base: Any = None) -> Config:
    """Makes the dataclass; what the tree does not say comes from `base` (the parent's default), else from the class."""
    values = dict(tree)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key, nested = prefix + field.name, section(kinds(cls)[field.name])
        default = getattr(base, field.name) if base is not None else default_of(field)
        if field.name not in values and default is dataclasses.MISSING:
            if nested is None or len(choices(kinds(cls)[field.name])) > 1:
                flag = "--" + key.replace("_", "-")
                raise ConfigError(_prefixed(where, f"missing `{key}`: give {flag}, or `{key}` in a --config file"))
            values[field.name] = {}
        if nested and isinstance(values.get(field.name), dict):
            inherited = default if isinstance(default, nested) else None
            values[field.name] = _build(nested, values[field.name], where, key + ".", inherited)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except ConfigError as error:
        raise ConfigError(_prefixed(where, f"{prefix.rstrip('.')}: {error}" if prefix else str(error))) from error


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value, or dataclasses.MISSING."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else is replaced."""
    merged = dict(under)
    for name, value in over.items():
        merged[name] = _merge(merged[name], value) if isinstance(value, dict) and isinstance(merged.get(name), dict) else value
    return merged


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- The command line ------------------------------------------------------------------------------------------------


def takes_model(cls: type) -> bool:
    """Whether a command's first word may be its model, without --model: where it must have one."""
    return kinds(cls).get("model") is str


def _read_flags(cls: type, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The `--config` files named by the arguments, and the tree that the other flags say."""
    files: list[str] = []
    tree: dict[str, Any] = {}
    named = argv.pop(0) if takes_model(cls) and argv and not argv[0].startswith("-") else None
    if named is not None:
        tree["model"] = named
    while argv:
        token = argv.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"unexpected argument `{token}`: every setting is a flag, as in --key value; quote text that holds spaces")
        name, equals, text = token[2:].partition("=")
        given = text if equals else None
        if name == "config":
            files.append(_value(name, given, argv, "path"))
            continue
        path, kind = _find(cls, name)
        if path == ["model"] and named:
            raise ConfigError(f"the model is given twice, as `{named}` and by --model: leave one out")
        if path is None and name.startswith(("no-", "no_")):
            path, kind = _find(cls, name[3:])
            if path is None or bool not in choices(kind) or equals:
                path = None
            given = "false"
        if path is None:
            raise ConfigError(unknown(name.replace("-", "_"), [*_paths(cls), "config"]))
        if given is None and bool in choices(kind):
            literal = bool(argv) and argv[0].lower() in ("true", "false", "null")
            given = argv.pop(0) if literal else "true"
        _put(tree, path, _from_text(_value(name, given, argv, describe(kind)), kind, name, _get(tree, path)))
    return files, tree


def _value(name: str, given: str | None, argv: list[str], expected: str) -> str:
    if given is not None:
        return given
    if not argv or argv[0].startswith("--"):
        raise ConfigError(f"--{name} needs a value ({expected}); one that starts with `--` is written --{name}=VALUE")
    return argv.pop(0)


def _from_text(text: str, kind: Any, name: str, before: Any) -> Any:
    """One flag's text as `kind`. `before`: what earlier flags with this name said (lists of text grow)."""
    lists = [option for option in choices(kind) if typing.get_origin(option) in (tuple, list)]
    if lists and not (text == "null" and types.NoneType in choices(kind)):
        origin, arguments = typing.get_origin(lists[0]), typing.get_args(lists[0])
        if all(item in (str, Path, ...) for item in arguments):
            return _convert([*(before or ()), text], origin[(str, ...)] if origin is tuple else lists[0], "", f"--{name}")
        return _convert([item.strip() for item in text.strip("[]() ").split(",") if item.strip()], lists[0], "", f"--{name}")
    if str in choices(kind):  # a file can say "3" or 3; a flag cannot, so there 3 is a number where a number will do
        for option in choices(kind):
            with contextlib.suppress(ConfigError):
                if option is not str:
                    return _convert(text, option, "", name)
    return _convert(text, kind, "", f"--{name}")


def _find(cls: type, name: str) -> tuple[list[str] | None, Any]:
    """The path and type of the field that a dotted flag names; below a dict field, the rest of the flag is its key."""
    path, kind, parts = [], cls, name.split(".")
    while parts:
        dicts = [option for option in choices(kind) if typing.get_origin(option) is dict]
        if dicts:
            return [*path, ".".join(parts)], typing.get_args(dicts[0])[1]
        nested, field = section(kind), parts.pop(0).replace("-", "_")
        if nested is None or field not in kinds(nested):
            return None, None
        path, kind = [*path, field], kinds(nested)[field]
    return path, kind


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        tree[name] = tree[name] if isinstance(tree.get(name), dict) else {}
        tree = tree[name]
    tree[path[-1]] = value


def _get(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


# --- Messages --------------------------------------------------------------------------------------------------------


def unknown(key: str, known: Sequence[str], noun: str = "key") -> str:
    """ "unknown key `x`; did you mean `y`?": the nearest of its own section, else that last word elsewhere, else by spelling."""
    wanted = key.replace("-", "_")
    parent, _, last = wanted.rpartition(".")
    lasts = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = difflib.get_close_matches(wanted, [path for path in known if path.rpartition(".")[0] == parent], n=1)
    near = near or [lasts[word] for word in difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)]
    near = near or difflib.get_close_matches(wanted, known, n=1)
    return f"unknown {noun} `{key}`; " + (f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}")


def _paths(cls: type, within: str = "") -> list[str]:
    """Every dotted key below `cls`; `within` is the place of `cls` in the whole tree, for the words of an error."""
    paths = []
    for name, kind in kinds(cls).items():
        nested = section(kind)
        paths += _paths(nested, f"{within}{name}.") if nested else [within + name]
    return paths


def _prefixed(where: str, message: str) -> str:
    return f"{where}: {message}" if where else message


def _shown(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value)) if value is None or isinstance(value, bool) else repr(value)


def _wrong(value: Any, kind: Any, where: str, key: str) -> ConfigError:
    hint = "; put it in quotes" if str in choices(kind) and value is not None and not isinstance(value, list | dict) else ""
    return ConfigError(_prefixed(where, f"`{key or 'configuration'}`: expected {describe(kind)}, got {_shown(value)}{hint}"))


def _fail(value: Any, kind: Any, where: str, key: str) -> typing.NoReturn:
    raise _wrong(value, kind, where, key)
