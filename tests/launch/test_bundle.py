"""Bundles: an engine's programs in a folder, loaded instead of compiled, or refused with the reason."""

import json
import logging
import shutil

import pytest
from golden_cases import MODELS, generated, golden
from tiny_models import write_llama

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.serving.bundle import MANIFEST
from jaxllm.serving.executables import ExecutableCache

pytestmark = pytest.mark.usefixtures("compiled_anew")
CASE = "llama_gqa"
FLAGS = ["--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--max-model-len", "96", "--num-pages", "40", "--dtype", "float32"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "llama"
    assert main(["compile", "--model", str(MODELS / CASE), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


_get = ExecutableCache.get


def loaded_only(cache, name, compile_):
    return _get(cache, name, lambda: pytest.fail(f"{name} was compiled"))


def edit(bundle, change):
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def make(bundle, **options):
    return LLM(MODELS / CASE, bundle=str(bundle), skip_tokenizer_init=True, compilation_cache_dir="", **options)


def check_answers(llm):
    prompts = [{"prompt_token_ids": g["prompt"].tolist()} for g in golden(CASE)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert [o.outputs[0].token_ids for o in outputs] == [tokens[:12] for tokens in generated(CASE)]
    assert llm.engine.runner.stats.compiles_after_warmup == 0


def test_nothing_is_compiled(bundle, monkeypatch):
    monkeypatch.setattr(ExecutableCache, "get", loaded_only)
    llm = make(bundle)
    llm.engine.runner.finish_warm_up()
    assert llm.engine.limits.max_num_seqs == 2 and llm.engine.pool.capacity == 40  # the bundle's settings
    check_answers(llm)


def test_generate_takes_it(tmp_path, capfd, monkeypatch):
    model = write_llama(tmp_path / "model", tokenizer=True)
    out = tmp_path / "bundle"
    assert main(["compile", "--model", str(model), "--out", str(out), *FLAGS]) == 0
    flags = ["generate", "--model", str(model), "--prompt", "the cat", "--max-tokens", "8", "--json"]
    answers = []
    for more in ([], ["--bundle", str(out)]):
        assert main([*flags, *more]) == 0
        answers.append(json.loads(capfd.readouterr().out.splitlines()[-1])["token_ids"])
        monkeypatch.setattr(ExecutableCache, "get", loaded_only)
    assert answers[0] == answers[1] and len(answers[0]) == 8


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda m: m["made_from"].update(jax="0.1.0"), "another jax (0.1.0, here "),
        (lambda m: m["made_from"].update({"the processor": "flags: none"}), "another the processor (flags: none, here "),
        (lambda m: m["made_from"].update({"the mesh": "another"}), "another the mesh"),
    ],
)
def test_one_that_was_made_elsewhere_is_refused_with_the_reason(copy, caplog, change, reason):
    edit(copy, change)
    with caplog.at_level(logging.WARNING):
        llm = make(copy, warmup=False)
    assert any("is not used, everything is compiled" in r.message and reason in r.getMessage() for r in caplog.records)
    check_answers(llm)


def test_other_settings_than_its_own(copy, caplog):
    with caplog.at_level(logging.WARNING):
        llm = make(copy, warmup=False, max_num_seqs=1)
    assert "the engine's settings" in caplog.text
    check_answers(llm)


def test_a_flipped_byte(copy, caplog):
    manifest = json.loads((copy / MANIFEST).read_text())
    for file in manifest["programs"]:
        data = bytearray((copy / file).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        llm = make(copy, warmup=False)
        check_answers(llm)
    assert "its bytes are not those that the manifest names" in caplog.text


def test_logits_processors_and_a_bundle_exclude_each_other(bundle):
    with pytest.raises(ConfigError, match="no programs with logits_processors"):
        make(bundle, logits_processors={"same": lambda logits, tokens, count: logits})


def test_what_is_no_bundle(tmp_path, bundle, copy, capfd):
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path / "none", tmp_path / "folder"):
        with pytest.raises(ConfigError, match="is not a bundle"):
            make(folder)
    edit(copy, lambda m: m.update(format=99))
    with pytest.raises(ConfigError, match="format 99"):
        make(copy)
    edit(copy, lambda m: m.update(format=1, programs=[]))
    with pytest.raises(ConfigError, match="is damaged"):
        make(copy)
    model = ["--model", str(MODELS / CASE)]
    assert main(["compile", *model, "--out", str(bundle)]) == 2  # it is there
    assert main(["compile", *model, "--out", str(tmp_path / "folder"), "--overwrite"]) == 2  # and this is none
    assert "give --overwrite" in capfd.readouterr().err and (bundle / MANIFEST).is_file()
