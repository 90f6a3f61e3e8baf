"""Batches: nothing lost, repeated or mixed up; the same on every run; and after a restore, the very same ones follow."""

import json
from collections import Counter

import numpy as np
import pytest
from data_files import make_records, plain_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError, DataError
from jaxllm.training.data import DataConfig, DataSource, make_dataset

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def segments(batch: dict) -> list[str]:
    """The text of every example in a batch; what must hold of any batch is checked on the way."""
    tokenizer, found = plain_tokenizer(), []
    for name in ("tokens", "targets", "segment_ids", "positions", "weights"):
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32) and batch[name].shape == batch["tokens"].shape
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        assert (ids[1:][np.diff(ids) != 0] * (np.diff(ids)[np.diff(ids) != 0] - 1) == 0).all()  # 1, 2, 3, and then padding
        assert not batch["weights"][row][ids == 0].any() and not batch["tokens"][row][ids == 0].any()
        for segment in range(1, ids.max() + 1):
            here = np.flatnonzero(ids == segment)
            tokens, targets, weights = (batch[name][row, here] for name in ("tokens", "targets", "weights"))
            assert (batch["positions"][row, here] == np.arange(len(here))).all() and (np.diff(here) == 1).all()
            assert (targets[:-1] == tokens[1:]).all() and targets[-1] == 0 and weights[-1] == 0 and weights.any()
            found.append(tokenizer.decode(tokens.tolist()))
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same(a[k], b[k]) if isinstance(a[k], dict) else np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [True, False])
def test_every_record_once_an_epoch(tmp_path, packing):
    records = make_records(101)
    config = DataConfig(path=(write_jsonl(tmp_path / "a.jsonl", records),), packing=packing, epochs=2, buckets=() if packing else (32, 64))
    dataset = make_dataset(config, plain_tokenizer(), batch_size=4, max_length=128, seed=5)
    batches = list(dataset)
    drawn = Counter(text for batch in batches for text in segments(batch))
    assert drawn == Counter({record["prompt"] + record["completion"]: 2 for record in records})
    assert dataset.counts["examples"] == 202 and dataset.epoch == 2.0
    assert {batch["tokens"].shape for batch in batches} <= {(4, 128), (4, 32), (4, 64)}
    if packing:
        waste = 1 - sum((batch["segment_ids"] > 0).sum() for batch in batches) / sum(batch["tokens"].size for batch in batches)
        assert waste < 0.12
        assert len(batches) < 0.7 * -(-202 // 4)
    else:
        assert len({batch["tokens"].shape for batch in batches}) == 3


def test_shuffles_by_seed_and_anew_in_each_epoch(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_records(40, longest=3))

    def order(seed, **options):
        dataset = make_dataset(
            DataConfig(path=(path,), packing=False, epochs=2, **options), plain_tokenizer(), batch_size=1, max_length=64, seed=seed
        )
        return [segments(batch)[0] for batch in dataset]

    first = order(1)
    assert first == order(1) and first != order(2) and first[:40] != first[40:] and sorted(first[:40]) == sorted(first[40:])
    plain = order(1, shuffle=False)
    assert plain[:40] == plain[40:] == [record["prompt"] + record["completion"] for record in make_records(40, longest=3)]
    assert first == order(1, read_threads=0)


def test_hosts_share_the_records(tmp_path):
    records = make_records(30, longest=3)
    config = DataConfig(path=(write_jsonl(tmp_path / "a.jsonl", records),), packing=False)
    drawn: list[str] = []
    for host in range(3):
        dataset = make_dataset(config, plain_tokenizer(), batch_size=5, max_length=64, shard_index=host, shard_count=3)
        drawn += [text for _ in range(2) for text in segments(next(dataset))]
    assert sorted(drawn) == sorted(record["prompt"] + record["completion"] for record in records)
    with pytest.raises(ConfigError, match="epochs"):
        make_dataset(DataConfig(path=config.path, epochs=1), plain_tokenizer(), batch_size=5, max_length=64, shard_count=3)


def test_mixture_follows_its_weights(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", make_records(20 + i, seed=i, longest=3)) for i in range(2)]
    sources = (DataSource(paths[0], weight=3), DataSource(paths[1], weight=1))
    dataset = make_dataset(DataConfig(sources=sources, packing=False), plain_tokenizer(), batch_size=10, max_length=64)
    drawn = Counter(text[:3] for _ in range(40) for text in segments(next(dataset)))
    assert drawn == {"<0:": 300, "<1:": 100}


CASES = {
    "packed": dict(),
    "packed, small window": dict(packing_window=1),
    "buckets": dict(packing=False, buckets=(16, 32)),
    "finite": dict(epochs=3),
    "in order": dict(shuffle=False),
    "skipping": dict(on_bad_record="skip", too_long="skip"),
    "mixture": dict(weights=(0.7, 0.3)),
    "split": dict(too_long="split", text=True),
    "no threads": dict(read_threads=0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    broken = [*make_records(9, seed=7), "{", {"prompt": "no completion"}, *make_records(5, seed=8, longest=90)]
    return {
        "a": write_jsonl(folder / "a.jsonl", make_records(37, seed=1)),
        "b": write_jsonl(folder / "b.jsonl", make_records(11, seed=2)),
        "broken": write_jsonl(folder / "broken.jsonl", broken),
        "text": write_jsonl(folder / "t.jsonl", [{"text": r["completion"]} for r in make_records(30, seed=3, longest=150)]),
    }


def build(files: dict[str, str], case: str):
    options = dict(CASES[case])
    weights = options.pop("weights", None)
    if options.pop("text", False):
        options["path"] = (files["text"],)
    elif weights:
        options["sources"] = tuple(DataSource(files[name], weight=weight) for name, weight in zip("ab", weights, strict=True))
    else:
        options["path"] = (files["a"], files["broken"]) if case == "skipping" else (files["a"], files["b"])
    return make_dataset(DataConfig(**options), plain_tokenizer(), batch_size=3, max_length=64, seed=11)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=st.lists(st.integers(0, 25), min_size=1, max_size=3))
def test_the_very_same_batches_follow_a_restore(files, case, points):
    whole = build(files, case)
    batches = [batch for _, batch in zip(range(80), whole, strict=False)]  # in this order it draws no 81st
    dataset, at = build(files, case), 0
    for point in points:  # stop and start again, several times
        point = min(point, len(batches) - at)
        for batch in batches[at : at + point]:
            assert same(next(dataset), batch)
        at += point
        state = dataset.get_state()
        assert isinstance(state, bytes) and state == dataset.get_state()
        dataset = build(files, case)
        dataset.set_state(state)
        assert dataset.get_state() == state
    for batch in batches[at:]:
        assert same(next(dataset), batch)
    if len(batches) < 80:
        assert next(dataset, None) is None
    assert dataset.counts == whole.counts and dataset.bad_records == whole.bad_records


def test_set_state_goes_back_too(files):
    dataset = build(files, "packed")
    state = dataset.get_state()
    first = [next(dataset) for _ in range(3)]
    dataset.set_state(state)
    assert all(same(next(dataset), batch) for batch in first)


def test_a_state_of_other_data_is_refused(files, tmp_path):
    dataset = build(files, "packed")
    next(dataset)
    state = dataset.get_state()
    with pytest.raises(DataError, match="data.packing_window was 32 and is 1"):
        build(files, "packed, small window").set_state(state)
    build(files, "no threads").set_state(state)  # the reading may be spread otherwise
    for broken in (b"{", b"null", json.dumps({**json.loads(state), "version": 2}).encode()):
        with pytest.raises(DataError, match="saved place in the data"):
            dataset.set_state(broken)


@pytest.mark.slow
def test_worker_processes_change_nothing(files):
    options = dict(path=(files["a"], files["b"]))
    make = lambda **more: make_dataset(DataConfig(**options, **more), plain_tokenizer(), batch_size=3, max_length=64, seed=11)
    plain, spread = make(), make(workers=2)
    assert all(same(next(plain), next(spread)) for _ in range(12))
    resumed = make(workers=1)
    resumed.set_state(spread.get_state())
    assert all(same(next(plain), next(resumed)) for _ in range(5))
    spread.close()
    resumed.close()
