"""The configuration machinery: every kind of mistake gets its sentence, and dict, YAML and flags say the same thing."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import from_dict, load_yaml, parse, to_dict
from jaxllm.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    learning_rate: float = 1e-4
    "Peak rate, after the warm-up."
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int | None = None

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class Source:
    """Where text comes from."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Train:
    """Fine-tune a model."""

    model: str
    "Folder or hub name."
    optimizer: Optimizer = Optimizer(learning_rate=3e-4)
    teacher: Optimizer | None = None
    stop: tuple[str, ...] = ()
    layers: list[int] = field(default_factory=list)
    dtype: Literal["auto", "float32"] = "auto"
    shuffle: bool = True
    stream: bool | None = None
    rank: int | str = "all"
    mixture: dict[str, float] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()


def cli(*flags: str) -> Train:
    return parse(Train, ["--model", "m", *flags], prog="jaxllm train")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--optimizer.learning_rate", "2e-5"], Train("m", Optimizer(2e-5))),
        (["--optimizer.learning-rate=2e-5"], Train("m", Optimizer(2e-5))),
        (["--optimizer.betas", "0.8,0.9"], Train("m", Optimizer(3e-4, (0.8, 0.9)))),  # the parent's default stays for the rest
        (["--teacher.warmup", "7"], Train("m", teacher=Optimizer(warmup=7))),
        (["--teacher.warmup", "7", "--teacher", "null"], Train("m")),
        (["--stop", "a", "--stop", "b c,d"], Train("m", stop=("a", "b c,d"))),
        (["--stop=--json"], Train("m", stop=("--json",))),
        (["--stop", "null"], Train("m", stop=("null",))),
        (["--layers", "[1, 2,-3]"], Train("m", layers=[1, 2, -3])),
        (["--no-shuffle"], Train("m", shuffle=False)),
        (["--shuffle", "false"], Train("m", shuffle=False)),
        (["--stream"], Train("m", stream=True)),
        (["--stream", "--no-shuffle"], Train("m", stream=True, shuffle=False)),
        (["--no-stream"], Train("m", stream=False)),
        (["--rank", "3"], Train("m", rank=3)),
        (["--rank", "most"], Train("m", rank="most")),
        (["--mixture.code-1.x", "0.5", "--mixture.web", "1"], Train("m", mixture={"code-1.x": 0.5, "web": 1.0})),
        (["--dtype", "auto", "--dtype", "float32"], Train("m", dtype="float32")),
    ],
)
def test_flags(flags, expected):
    assert cli(*flags) == expected


def test_the_first_word_is_the_model():
    assert parse(Train, ["org/name", "--rank", "3"], prog="jaxllm train") == Train("org/name", rank=3)
    with pytest.raises(ConfigError, match="the model is given twice, as `a` and by --model"):
        parse(Train, ["a", "--model", "b"], prog="jaxllm train")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lerning_rate", "1"], "unknown key `lerning_rate`; did you mean `optimizer.learning_rate`?"),
        (["--optimizer.lerning-rate", "1"], "unknown key `optimizer.lerning_rate`; did you mean `optimizer.learning_rate`?"),
        (["--teacher.lerning-rate=1"], "unknown key `teacher.lerning_rate`; did you mean `teacher.learning_rate`?"),
        (["--modle", "x"], "unknown key `modle`; did you mean `model`?"),
        (["--confg", "x"], "unknown key `confg`; did you mean `config`?"),
        (["--model.x", "1"], "unknown key `model.x`; did you mean `model`?"),
        (["--qqqqq", "x"], "unknown key `qqqqq`; known: model, optimizer.learning_rate"),
        (["--no-model"], "unknown key `no_model`; did you mean `model`?"),
        (["--no-shuffle=true"], "unknown key `no_shuffle`; did you mean `shuffle`?"),
        (["--shuffle", "maybe"], "unexpected argument `maybe`"),
        (["--shuffle=maybe"], "`--shuffle`: expected bool, got 'maybe'"),
        (["stray"], "unexpected argument `stray`: every setting is a flag"),
        (["-m", "x"], "unexpected argument `-m`"),
        (["--model"], "--model needs a value (text); one that starts with `--` is written --model=VALUE"),
        (["--model", "--shuffle"], "--model needs a value (text)"),
        (["--optimizer.learning-rate", "fast"], "`--optimizer.learning-rate`: expected float, got 'fast'"),
        (["--optimizer.learning-rate", "-1"], "optimizer: learning_rate must be positive, got -1.0"),
        (["--optimizer.warmup", "1.5"], "`--optimizer.warmup`: expected int or null, got '1.5'"),
        (["--optimizer.betas", "0.9"], "`--optimizer.betas`: expected [float, float], got ['0.9']"),
        (["--layers", "1,x"], "`--layers[1]`: expected int, got 'x'"),
        (["--dtype", "float31"], "`--dtype`: expected auto|float32, got 'float31'"),
        (["--optimizer", "adam"], "`--optimizer`: expected section of keys, got 'adam'"),
        (["--optimizer", "null"], "`--optimizer`: expected section of keys, got 'null'"),
        (["--mixture.web", "lots"], "`--mixture.web`: expected float, got 'lots'"),
        (["--config"], "--config needs a value (path)"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot read this configuration file (No such file or directory)"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ConfigError) as caught:
        cli(*flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "run.yaml: unknown key `lerning_rate`; did you mean `optimizer.learning_rate`?"),
        ("optimizer: {lerning_rate: 1}", "run.yaml: unknown key `optimizer.lerning_rate`; did you mean `optimizer.learning_rate`?"),
        ("model: m\noptimizer: {learning_rate: 0}", "run.yaml: optimizer: learning_rate must be positive, got 0.0"),
        ("optimizer: adam", "run.yaml: `optimizer`: expected section of keys, got 'adam'"),
        ("optimizer:", "run.yaml: `optimizer`: expected section of keys, got null"),
        ("optimizer: [1]", "run.yaml: `optimizer`: expected section of keys, got [1]"),
        ("optimizer: {warmup: yes}", "run.yaml: `optimizer.warmup`: expected int or null, got true"),
        ("optimizer: {warmup: 1.0}", "run.yaml: `optimizer.warmup`: expected int or null, got 1.0"),
        ("model: 7", "run.yaml: `model`: expected text, got 7; put it in quotes"),
        ("model: no", "run.yaml: `model`: expected text, got false; put it in quotes"),
        ("model:", "run.yaml: `model`: expected text, got null"),
        ("stop: END", "run.yaml: `stop`: expected list of text, got 'END'"),
        ("stop: [1]", "run.yaml: `stop[0]`: expected text, got 1; put it in quotes"),
        ("dtype: float31", "run.yaml: `dtype`: expected auto|float32, got 'float31'"),
        ("shuffle: 1", "run.yaml: `shuffle`: expected bool, got 1"),
        ("sources: [{path: a}, {weight: 2}]", "run.yaml: missing `sources[1].path`"),
        ("sources: [{path: a, wieght: 2}]", "run.yaml: unknown key `sources[0].wieght`; did you mean `sources[0].weight`?"),
        ("mixture: {web: lots}", "run.yaml: `mixture.web`: expected float, got 'lots'"),
        ("shuffle: true\ndtype: auto\nshuffle: false", "run.yaml: line 3: key `shuffle` is written twice; keep one"),
        ("optimizer: {learning_rate: 1, learning-rate: 2}", "key `optimizer.learning_rate` is written twice, once with hyphens"),
        ("optimizer: {", "run.yaml: line 1: not valid YAML"),
        ("just text", "run.yaml: expected `key: value` lines, got 'just text'"),
        ("- a\n- b", "run.yaml: expected `key: value` lines, got ['a', 'b']"),
        ("? [1, 2]\n: 3", "run.yaml: line 1: not valid YAML"),
        ("when: 2026-01-01", "run.yaml: unknown key `when`"),
        ("x: !!python/object:os.system {}", "run.yaml: line 1: not valid YAML"),
        ("dtype: auto", "run.yaml: missing `model`: give --model, or `model` in a --config file"),
    ],
)
def test_bad_yaml(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(Train, ["--config", "run.yaml"], prog="jaxllm train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"model\.gguf: cannot read this configuration file"):
        load_yaml(tmp_path / "model.gguf")


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: m\noptimizer: {learning-rate: 1e-3, warmup: 5}\nstop: [a]\nmixture: {web: 1}")
    second.write_text("optimizer: {warmup: 6}\nmixture: {code: 2}")
    config = parse(Train, ["--config", str(first), "--optimizer.betas", "0,0.5", "--stop", "b", f"--config={second}"], prog="x")
    assert config == Train("m", Optimizer(1e-3, (0.0, 0.5), 6), stop=("b",), mixture={"web": 1.0, "code": 2.0})
    assert parse(Train, ["--config", str(first), "--optimizer.warmup", "null"], prog="x").optimizer.warmup is None


def test_missing_required_value():
    with pytest.raises(ConfigError, match="missing `model`: give --model"):
        parse(Train, [], prog="jaxllm train")


def test_a_choice_between_sections_is_a_programming_error():
    @dataclass(frozen=True)
    class Either:
        x: Optimizer | Train | None = None

    Either.__annotations__["x"] = Optimizer | Train | None
    with pytest.raises(TypeError, match="Either.x"):
        from_dict(Either, {})


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse(Train, ["--dtype", "nonsense", "--help"], prog="jaxllm train")
    page = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("usage: jaxllm train [MODEL] ", "Fine-tune a model.", "Folder or hub name. (required)", "--shuffle [true|false]"):
        assert part in page
    assert "Peak rate, after the warm-up. (default: 0.0003)" in page  # the parent's default, not the class's
    assert "Peak rate, after the warm-up. (default: 0.0001)" in page  # teacher's
    assert max(map(len, page.splitlines())) <= 100


def test_help_of_several_lines(capsys):
    @dataclass(frozen=True)
    class Long:
        x: int = 1
        "A first line "
        "and a second."
        y: int = 2
        "Another."

    with pytest.raises(SystemExit):
        parse(Long, ["--help"], prog="x")
    page = " ".join(capsys.readouterr().out.split())
    assert "A first line and a second. (default: 1)" in page and "Another. (default: 2)" in page


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
number = st.floats(allow_nan=False)
optimizers = st.builds(Optimizer, st.floats(1e-9, 1e9), st.tuples(number, number), st.none() | st.integers())
trains = st.builds(
    Train,
    text,
    optimizers,
    st.none() | optimizers,
    st.lists(text, max_size=3).map(tuple),
    st.lists(st.integers(), max_size=3),
    st.sampled_from(["auto", "float32"]),
    st.booleans(),
    st.none() | st.booleans(),
    st.integers() | text.filter(lambda word: not word.strip().lstrip("+-").replace("_", "").isdigit()),
    st.dictionaries(text, number, max_size=3),
    st.lists(st.builds(Source, text.map(Path), number), max_size=3).map(tuple),
)


@settings(max_examples=40)
@given(trains)
def test_to_dict_and_yaml_bring_it_back(config):
    tree = to_dict(config)
    assert from_dict(Train, tree) == config
    assert from_dict(Train, yaml.safe_load(yaml.safe_dump(tree, allow_unicode=False))) == config


@settings(max_examples=40)
@given(trains)
def test_flags_bring_it_back(config):
    flags = [f"--{name}={getattr(config, name)}" for name in ("model", "dtype", "rank", "layers")]
    flags += [f"--stop={word}" for word in config.stop]
    flags += ["--shuffle" if config.shuffle else "--no-shuffle"]
    flags += ["--stream=null" if config.stream is None else f"--stream={config.stream}"]
    flags += [f"--optimizer.{name}={getattr(config.optimizer, name)}" for name in ("learning_rate", "betas")]
    mixture = {name: value for name, value in config.mixture.items() if "=" not in name}
    flags += [f"--mixture.{name}={value}" for name, value in mixture.items()]
    read = parse(Train, flags, prog="x")
    for name in ("model", "dtype", "rank", "layers", "stop", "shuffle", "stream"):
        assert getattr(read, name) == getattr(config, name)
    assert read.mixture == mixture
    assert (read.optimizer.learning_rate, read.optimizer.betas) == (config.optimizer.learning_rate, config.optimizer.betas)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(words | st.sampled_from(["--", "--config", "--shuffle", "--optimizer.betas"])))
def test_no_arguments_crash_the_parser(argv):
    try:
        parse(Train, [token for token in argv if token not in ("-h", "--help")], prog="x")
    except ConfigError as error:
        assert str(error)


def test_importing_costs_no_yaml_and_no_jax():
    import subprocess

    script = "import sys, jaxllm.config; print(*[name for name in ('jax', 'yaml', 'rich', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == ""
