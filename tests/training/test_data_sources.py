"""Files of every format; what is wrong with a record or a file is said with its place and its remedy."""

import io
import json

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_files import make_records, plain_tokenizer, write_jsonl
from rich.console import Console

from jaxllm.config import from_dict, to_dict
from jaxllm.errors import ConfigError, DataError
from jaxllm.training.data import DataConfig, DataSource, dry_run, make_dataset
from jaxllm.training.data.sources import open_table


def read_all(path, **options) -> list[dict]:
    table = open_table(DataSource(str(path), **options))
    return [table.read(i) for i in range(len(table))]


def dataset_of(path, batch_size=2, max_length=256, **options):
    return make_dataset(DataConfig(path=(str(path),), **options), plain_tokenizer(), batch_size=batch_size, max_length=max_length)


RECORDS = make_records(12)


def test_json_lines(tmp_path):
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\n\n".join(lines[:7]) + "\r\n").encode())
    (tmp_path / "b.jsonl").write_bytes("\n".join(lines[7:]).encode())
    (tmp_path / "README.md").write_text("about")
    assert read_all(tmp_path) == read_all(tmp_path / "*.jsonl") == RECORDS
    assert read_all(tmp_path, start=2, stop=9) == RECORDS[2:9] and read_all(tmp_path, start=-2) == RECORDS[-2:]
    table = open_table(DataSource(str(tmp_path)))
    assert table.where(1) == f"{tmp_path}/a.jsonl: line 3" and table.where(8) == f"{tmp_path}/b.jsonl: line 2"


def test_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\n\nthree\nfour\n\n  \nfive")
    assert [record["text"] for record in read_all(file)] == ["one", "two", "three", "four", "five"]
    assert [record["text"] for record in read_all(file, text_by="paragraph")] == ["one\ntwo", "three\nfour", "five"]
    assert [record["text"] for record in read_all(file, text_by="file")] == [file.read_text()]


def test_array_record(tmp_path):
    file = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()
    assert read_all(file) == RECORDS
    (tmp_path / "broken.array_record").write_bytes(b"what")
    with pytest.raises(DataError, match="not a whole ArrayRecord file"):
        read_all(tmp_path / "broken.array_record")


def test_parquet_and_saved_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": record["prompt"]}], "no": None} for record in RECORDS])
    expected = [{"messages": [{"role": "user", "content": record["prompt"]}]} for record in RECORDS]
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    assert read_all(tmp_path / "a.parquet") == expected
    folder = tmp_path / "saved"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 7), table.slice(7)), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    assert read_all(folder) == expected
    (folder / names[1]).unlink()
    with pytest.raises(DataError, match="names data-00001-of-00002.arrow, which is missing"):
        read_all(folder)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"need pyarrow: pip install 'jaxllm\[arrow\]'"):
        read_all(tmp_path / "a.parquet")


def test_files_that_cannot_be(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "a.jsonl").write_text("{}")
    for name, message in [
        ("nothing.jsonl", "no such file"),
        ("*.none", "no file matches"),
        ("empty.jsonl", "no records"),
        ("a.json", "write it as .jsonl"),
        ("splits", "name one, such as .*splits/train"),
        ("mixed", "several formats"),
    ]:
        with pytest.raises(DataError, match=message):
            read_all(tmp_path / name)


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD = {
    '{"messages": [': "not valid JSON .* at column",
    "[1]": "expected a JSON object",
    '{"prompt": "a"}': "a chat record needs `messages`, and this one has the keys prompt",
    '{"messages": []}': "`messages` must be a list of messages .* is empty",
    '{"messages": [{"content": "a"}]}': r"`messages\[0\]` must be an object with a `role`",
    '{"messages": [{"role": "user"}]}': r"`messages\[0\]` \(role user\) has no `content`",
    '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}': r"tool_calls\[0\]` must be an object with function.name",
    '{"messages": "x"}': "`messages` is text that is not valid JSON",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "lone surrogate",
    '{"messages": [{"role": "user", "content": "a"}], "tools": 1}': "`tools` must be a list",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_reported_with_file_and_line_and_skipped_when_asked(tmp_path, line, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(DataError, match=f"a.jsonl: line 3: .*{BAD[line]}"):
        list(dataset_of(path, epochs=1))
    dataset = dataset_of(path, epochs=1, on_bad_record="skip")
    assert sum(len(set(batch["segment_ids"].flatten())) - 1 for batch in dataset) >= 1
    assert dataset.counts["bad_records"] == 1 and dataset.counts["examples"] == 3
    assert "a.jsonl: line 3" in dataset.bad_records[0] and "a.jsonl: line 3" in caplog.text


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: byte 10 of the record is not UTF-8"):
        list(dataset_of(tmp_path / "a.jsonl", epochs=1, shuffle=False))


def test_kinds_and_columns(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Say\n", "output": "b"}])
    with pytest.raises(DataError, match="line 1: the record has the keys instruction, output, which is no kind .*`columns`"):
        dataset_of(path)
    sources = (DataSource(path, columns={"prompt": "instruction", "completion": "output"}),)
    dataset = make_dataset(DataConfig(sources=sources, epochs=1), plain_tokenizer(), batch_size=1, max_length=16)
    assert dataset.stream.kinds == ["completion"] and next(dataset)["weights"].sum() == 2
    share = write_jsonl(tmp_path / "s.jsonl", [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    assert dataset_of(share).stream.kinds == ["chat"]
    pair = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ConfigError, match="do not mix"):
        make_dataset(DataConfig(path=(path.replace("a.jsonl", "s.jsonl"), pair)), plain_tokenizer(), batch_size=1, max_length=16)


@pytest.mark.parametrize("policy", ["truncate", "skip", "error", "split"])
def test_too_long(tmp_path, policy):
    text = "one two three four five six seven eight nine ten"
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": "short"}])
    dataset = dataset_of(path, epochs=1, shuffle=False, too_long=policy, max_length=12, append_eos=False)
    if policy == "error":
        with pytest.raises(DataError, match="line 1: [0-9]+ tokens, and a row holds max_length=12"):
            next(dataset)
        return
    batches = list(dataset)
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    whole, short = (len(plain_tokenizer().encode(some)) for some in (text, "short"))
    assert whole > 24
    assert tokens == {"truncate": 12 + short, "skip": short, "split": whole + short}[policy]
    assert dataset.counts[{"truncate": "truncated", "skip": "too_long", "split": "split"}[policy]] == 1


def test_what_leaves_nothing_to_learn_is_counted_and_all_of_it_is_an_error(tmp_path):
    long = {"prompt": "a long prompt " * 10, "completion": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", [long, {"prompt": "a", "completion": "b"}])
    dataset = dataset_of(path, epochs=1, max_length=16)
    assert len(list(dataset)) == 1 and dataset.counts["nothing_to_learn"] == 1
    path = write_jsonl(tmp_path / "b.jsonl", [long, long])
    with pytest.raises(DataError, match="none of 2 records in a row .* no token to learn is left within max_length=16"):
        next(dataset_of(path, max_length=16))
    path = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}, "{", "{"])
    with pytest.raises(ConfigError, match="too_long=split"):
        dataset_of(path, too_long="split")


def test_a_file_that_changes_under_the_run(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    dataset = dataset_of(path, read_threads=0)
    next(dataset)
    with open(path, "a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match="changed while it was being read"):
        for _ in range(20):
            next(dataset)


def test_dry_run_shows_and_leaves_the_dataset_alone(tmp_path):
    marked = {"messages": [{"role": "user", "content": "[red]x"}, *GOOD["messages"]]}
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, {"messages": 3}, marked])
    dataset = dataset_of(path, epochs=1, shuffle=False, on_bad_record="skip")
    before = dataset.get_state()
    stream = io.StringIO()
    report = dry_run(dataset, rows=2, console=Console(file=stream, width=400, force_terminal=True, color_system="standard"))
    assert dataset.get_state() == before
    json.dumps(report)
    said = [span["text"] for row in report["rows"] for span in row["spans"] if span["learned"]]
    assert said == ["b<|im_end|>", "b<|im_end|>"] and report["learned_tokens"] == 4 and report["batch_shape"] == [2, 256]
    assert report["padding_waste"] == round(1 - report["tokens"] / 512, 4) and report["drawn"]["bad_records"] == 1
    shown = stream.getvalue()
    assert "30;42mb<|im_end|>" in shown and "[red]x" in shown and "a.jsonl: line 2" in shown
    assert dry_run(dataset)["rows"] == report["rows"]


def test_config_is_a_tree():
    config = DataConfig(sources=(DataSource("a", weight=2.0, columns={"prompt": "q"}), DataSource("b", weight=1.0)), loss_on=("user",))
    assert from_dict(DataConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="no `weight` and others have"):
        DataConfig(sources=(DataSource("a", weight=2.0), DataSource("b")))
    with pytest.raises(ConfigError, match="has no epochs"):
        DataConfig(sources=(DataSource("a", weight=2.0),), epochs=1)
