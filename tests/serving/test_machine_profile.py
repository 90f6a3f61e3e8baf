"""Constants of a policy that are the machine's: measured by the engine, in its records, and taken from the simulator's machine."""

import dataclasses
import json

import pytest
from golden_cases import LENGTH, MODELS, generated, golden

from jaxllm import LLM, SamplingParams
from jaxllm.serving.policies import POLICIES, needs_profile, with_profile
from jaxllm.serving.replay import replay
from jaxllm.simulation import CostModel
from jaxllm.simulation.simulate import limits_of

OPTIONS = dict(
    dtype="float32", max_num_seqs=4, max_model_len=LENGTH, max_num_batched_tokens=32, skip_tokenizer_init=True, compilation_cache_dir=""
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "record.jsonl"
    llm = LLM(MODELS / "llama_gqa", **OPTIONS, scheduling_policy="mlfq", scheduling_policy_options={"starvation_s": 7.0}, record=str(path))
    yield llm, path
    llm.engine.close()


def test_measured_constants_are_the_schedulers(recorded):
    policy = recorded[0].engine.scheduler.policy
    assert policy.first_quantum_s == policy.step_s and policy.starvation_s == 7.0
    assert 1e-6 < policy.prompt_token_s < policy.step_s < 1.0  # a step of 512 tokens of this model costs less than 512 steps of one


def test_steps_of_padding_leave_the_engine_as_it_was(recorded):
    engine, prompts = recorded[0].engine, [case["prompt"].tolist() for case in golden("llama_gqa")]
    free = engine.pool.num_free
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        tokens |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        engine.runner.profile()
    assert [tokens[name] for name in sorted(tokens, key=int)] == generated("llama_gqa") and engine.pool.num_free == free
    assert engine.runner.stats.compiles_after_warmup == 0


def test_a_record_has_them(recorded):
    llm, path = recorded
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=3, temperature=0))
    llm.engine.close()
    header = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    options = header["config"]["policy_options"]
    assert options == {k: v for k, v in dataclasses.asdict(llm.engine.scheduler.policy).items() if k in options} and len(options) == 4
    assert not replay(str(path)).truncated


def test_given_ones_are_kept():
    given = {"first_quantum_s": 0.5, "step_s": 0.25, "prompt_token_s": 0.125}
    assert needs_profile("mlfq", {"step_s": 1.0}) and not needs_profile("mlfq", given)
    assert with_profile("mlfq", given, 1.0, 2.0) == given
    assert [name for name in POLICIES if needs_profile(name, {})] == ["mlfq"]


def test_the_simulators_are_its_machines():
    cost = CostModel(step_s=0.2, token_s=0.003, kv_tokens=64, kv_token_bytes=8)
    limits, _ = limits_of(cost, max_num_seqs=2, max_num_batched_tokens=8, page_size=4, policy="mlfq", options={"step_s": 0.1})
    assert limits.policy_options == {"first_quantum_s": 0.2, "step_s": 0.1, "prompt_token_s": 0.003}
