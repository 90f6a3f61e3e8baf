"""A recorded run gives the same plans again, a changed scheduler is found out, and a broken record is refused by its line."""

import json
import random

import pytest
from golden_cases import LENGTH, MODELS, golden

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.launch.__main__ import main
from jaxllm.serving import replay as module
from jaxllm.serving.kv_cache import PagePool, page_names
from jaxllm.serving.replay import RecordingScheduler, Replayed, ReplayError, open_record, replay
from jaxllm.serving.scheduler import Scheduler, SchedulerConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def recorded(path, seed: int) -> Replayed:
    """Records a random life of a crowded scheduler, with everything that can happen to it; what replaying it should say."""
    rng = random.Random(seed)
    config = SchedulerConfig(3, 12, 40, 4, policy=rng.choice(["fcfs", "priority"]))
    scheduler = RecordingScheduler(config, PagePool(14), open_record(str(path)))
    alive, plans, number, calls, num_plans = [], [], 0, 0, 0
    for _ in range(300):
        choice, calls = rng.random(), calls + 1
        if choice < 0.2:
            prompt = [i if i < rng.randint(0, 12) else rng.randint(0, 99) for i in range(rng.randint(1, 20))]
            options = {"priority": rng.randint(0, 2)} if config.policy == "priority" else {}
            if alive and rng.random() < 0.5:
                options |= {"fork_of": rng.choice(alive), "common": rng.randint(0, len(prompt))}
            scheduler.add(number, len(prompt), rng.randint(1, 20), page_names(prompt, 4), **options)
            alive.append(number)
            number += 1
        elif choice < 0.25 and alive:
            scheduler.finish(alive.pop(rng.randrange(len(alive))))
        elif choice < 0.27:
            scheduler.reset_prefix_cache()
        elif choice < 0.3 and alive:
            scheduler.retire(rng.choice(alive))
        elif choice < 0.35 and alive:
            scheduler.name_pages(rng.choice(alive), [rng.randbytes(16)])
        elif choice < 0.7 and plans:
            scheduler.complete(plans.pop(0))
        else:
            num_plans += 1
            if (plan := scheduler.schedule()).scheduled:
                plans.append(plan)
    scheduler.close()
    return Replayed(num_plans, calls, truncated=False)


@pytest.mark.parametrize("seed", range(20))
def test_random_lives(seed, tmp_path):
    path = tmp_path / "record.jsonl"
    assert recorded(path, seed) == replay(str(path))


def test_every_changed_plan_is_found(tmp_path):
    """Each number of the plans, changed by one; the line is named."""
    path, changed = tmp_path / "record.jsonl", tmp_path / "changed.jsonl"
    recorded(path, 1)
    lines = path.read_text().splitlines()
    rng = random.Random(0)
    for n in rng.sample([n for n, line in enumerate(lines) if line.startswith('["plan",[[')], 20):
        plan = json.loads(lines[n])
        row = rng.choice(plan[1])
        i = rng.randrange(9)
        row[i] = [*row[i], 1] if i == 8 else row[i] + 1
        changed.write_text("\n".join([*lines[:n], json.dumps(plan), *lines[n + 1 :]]) + "\n")
        with pytest.raises(ReplayError, match=rf"line {n + 1}: plan \d+ differs .* then, .* now"):
            replay(str(changed))


def test_a_changed_scheduler_is_found(tmp_path, monkeypatch):
    class Changed(Scheduler):
        def _num_ready(self, sequence):
            return min(super()._num_ready(sequence), 5)

    recorded(tmp_path / "record.jsonl", 2)
    monkeypatch.setattr(module, "Scheduler", Changed)
    with pytest.raises(ReplayError, match="plan .* differs"):
        replay(str(tmp_path / "record.jsonl"))


def test_a_crash_leaves_a_record_that_replays(tmp_path):
    path = tmp_path / "record.jsonl"
    whole = recorded(path, 3)
    path.write_bytes(path.read_bytes()[:-7])
    got = replay(str(path))
    assert got.truncated and got.calls == whole.calls - 1
    path.write_text('{"jaxllm_record":2')
    with pytest.raises(ConfigError, match="line 1: it is not JSON"):
        replay(str(path))


BROKEN = {
    "no header": (0, '["plan",[],[]]', "line 1: it is no record's header"),
    "version": (0, '{"jaxllm_record":99}', "line 1: the record has version 99, and this jaxllm reads versions 2 and 3"),
    "header without config": (0, '{"jaxllm_record":2}', "line 1: cannot be replayed"),
    "header of another scheduler": (0, '{"jaxllm_record":2,"config":{"max_num_dogs":1},"num_pages":9}', "line 1: .*max_num_dogs"),
    "garbage": (5, "\x00\x01", "line 6: it is not JSON"),
    "not a call": (5, "7", "line 6: cannot be replayed"),
    "no such call": (5, '["dance"]', "line 6: .*no call 'dance'"),
    "arguments": (5, '["add",1]', "line 6: cannot be replayed"),
    "names": (5, '["name_pages",0,["zz"]]', "line 6: cannot be replayed"),
    "plan never made": (5, '["complete",999]', "line 6: cannot be replayed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records(case, tmp_path):
    n, line, message = BROKEN[case]
    path = tmp_path / "record.jsonl"
    recorded(path, 4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:n], line, *lines[n + 1 :]]) + "\n")
    with pytest.raises(ConfigError, match=message):
        replay(str(path))


def test_the_command_and_an_engine(tmp_path, capsys):
    """A real engine's record: forks, preemption, chunks, aborts; then the command, and its exit status."""
    path = tmp_path / "record.jsonl"
    options = dict(dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, page_size=4, max_model_len=LENGTH, num_pages=22)
    llm = LLM(MODELS / "llama_gqa", **options, skip_tokenizer_init=True, warmup=False, record=str(path))
    prompts = [{"prompt_token_ids": g["prompt"].tolist()} for g in golden("llama_gqa")]
    params = SamplingParams(n=3, max_tokens=24, ignore_eos=True)
    llm.generate(prompts, params)
    stream = llm.stream(prompts[2], params)
    for _ in range(4):
        next(stream)
    stream.close()
    llm.reset_prefix_cache()
    llm.generate(prompts[0], params)
    assert llm.engine.scheduler.num_preemptions > 0
    llm.engine.close()
    text = path.read_text()
    assert all(f'["{name}"' in text for name in ("add", "finish", "name_pages", "complete", "plan", "reset"))
    plans = text.count('["plan"')
    assert main(["simulate", "--replay", str(path)]) == 0
    assert f"{plans} plans, all identical" in capsys.readouterr().out
    assert main(["simulate", "--replay", str(path), "--json"]) == 0
    path.write_text(text.replace('"max_num_batched_tokens":16', '"max_num_batched_tokens":15'))
    assert main(["simulate", "--replay", str(path)]) == 1
    assert "plan 0 differs" in capsys.readouterr().err
    path.write_text(text[:-3])
    assert main(["simulate", "--replay", str(path)]) == 0
    assert "the last line is cut off" in capsys.readouterr().out
    path.write_text("")
    assert main(["simulate", "--replay", str(path)]) == 2
    assert main(["simulate", "--replay", str(tmp_path / "none")]) == 2
    with pytest.raises(ConfigError, match="record: cannot write"):
        LLM(MODELS / "llama_gqa", **options, record=str(tmp_path / "no" / "folder"))
