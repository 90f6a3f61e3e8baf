"""Any way of cutting prompts into chunks, and of sharing steps and pages, gives the logits that transformers has for whole prompts."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import LENGTH, MODELS, generated, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.serving.attend import paged_attend
from jaxllm.sharding import ShardingRules, make_mesh

CASES = ["llama_gqa", "gemma2", "gemma3_text", "gpt2", "llama_rope_dynamic"]
TOKENS, SEQUENCES, PAGES, PAGE_SIZE = 48, 4, 40, 4  # of every step: one program a case
COLUMNS = LENGTH // PAGE_SIZE


@lru_cache
def program(case: str):
    """The model's configuration, weights, and a compiled step: all rows' logits, and the cache."""
    mesh, rules = make_mesh(), ShardingRules()
    model = load_model(open_checkpoint(MODELS / case), dtype=jnp.float32, mesh=mesh, rules=rules)

    def step(params, kv_pages, batch):
        decoder = nnx.merge(model.graph, params)
        sequences = (batch[name] for name in ("page_table", "kv_lens", "query_starts", "counts"))
        attend = paged_attend(*sequences, num_pages=PAGES, mesh=mesh, rules=rules, decode_only=False)
        hidden, kv_pages = decoder(batch["tokens"], batch["positions"], attend, kv_pages, rope_lengths=batch["rope_lengths"])
        return decoder.logits(hidden), kv_pages

    return model, jax.jit(step)


@st.composite
def schedules(draw, lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Steps of (prompt, tokens) that compute prompts of these lengths, each in chunks, some together; decodes (one token) first."""
    left, steps = list(lengths), []
    while any(left):
        step, room = [], TOKENS
        going = [i for i, n in enumerate(left) if n]
        for i in draw(st.lists(st.sampled_from(going), min_size=1, max_size=len(going), unique=True)):
            most = min(left[i], room)
            if most == 0:
                break
            count = min(most, draw(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, TOKENS))))
            step.append((i, count))
            left[i] -= count
            room -= count
        steps.append(sorted(step, key=lambda chunk: chunk[1] > 1))
    return steps


def run(case: str, prompts: list[np.ndarray], tables: np.ndarray, done: list[int], steps) -> list[np.ndarray]:
    """The logits of prompts computed step by step, from the `done` first tokens of each on, over pages of garbage."""
    model, step = program(case)
    c = model.config
    kv_pages = jnp.full((c.num_layers * PAGES, 2, c.num_kv_heads, PAGE_SIZE, c.head_dim), jnp.nan)  # unwritten: it must not matter
    done, rows = list(done), [[] for _ in prompts]
    for chunks in steps:
        batch = {name: np.zeros(TOKENS, np.int32) for name in ("tokens", "positions", "rope_lengths")}
        batch |= {"page_table": np.zeros((SEQUENCES, COLUMNS), np.int32), "kv_lens": np.zeros(SEQUENCES, np.int32)}
        starts = np.cumsum([0] + [count for _, count in chunks])
        batch["query_starts"] = np.pad(starts, (0, SEQUENCES + 1 - len(starts)), mode="edge").astype(np.int32)
        batch["counts"] = np.array([sum(count == 1 for _, count in chunks), len(chunks)], np.int32)
        for n, (i, count) in enumerate(chunks):
            here, positions = slice(starts[n], starts[n + 1]), np.arange(done[i], done[i] + count)
            batch["tokens"][here], batch["positions"][here] = prompts[i][positions], positions
            batch["rope_lengths"][here] = np.maximum(len(prompts[i]), positions + 1)
            batch["page_table"][n], batch["kv_lens"][n] = tables[i], done[i] + count
            done[i] += count
        logits, kv_pages = step(model.params, kv_pages, batch)
        assert np.isfinite(logits).all()  # padding too
        for n, (i, _) in enumerate(chunks):
            rows[i].append(np.asarray(logits)[starts[n] : starts[n + 1]])
    return [np.concatenate(r) for r in rows]


def page_tables(prompts: list[np.ndarray], seed: int) -> np.ndarray:
    """Pages of each prompt, in random order; page 0 is what padding points at."""
    ids = iter(np.random.default_rng(seed).permutation(PAGES - 1) + 1)
    tables = np.zeros((len(prompts), COLUMNS), np.int32)
    for table, prompt in zip(tables, prompts, strict=True):
        pages = -(-len(prompt) // PAGE_SIZE)
        table[:pages] = [next(ids) for _ in range(pages)]
    return tables


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15)
@given(steps=schedules([5, 21, 40]), seed=st.integers(0, 2**31 - 1))
def test_any_chunking_gives_the_same_logits(case, steps, seed):
    references = golden(case)
    prompts = [r["prompt"] for r in references]
    for ours, reference in zip(run(case, prompts, page_tables(prompts, seed), [0, 0, 0], steps), references, strict=True):
        np.testing.assert_allclose(ours, reference["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_one_token_at_a_time_and_all_at_once(case):
    references = golden(case)
    for steps in ([[(0, 1)]] * 40, [[(0, 40)]]):
        ours = run(case, [references[2]["prompt"]], page_tables([references[2]["prompt"]], 0), [0], steps)[0]
        np.testing.assert_allclose(ours, references[2]["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma3_text"])
@pytest.mark.parametrize("together", [False, True])
def test_shared_pages(case, together):
    """A prompt whose beginning another computes, in the step before or in the very same step, where it even comes first."""
    reference = golden(case)[2]
    prompts = [reference["prompt"][:36], reference["prompt"][:37]]
    tables = page_tables(prompts, 1)
    tables[1, :9] = tables[0, :9]
    steps = [[(1, 1), (0, 36)]] if together else [[(0, 36)], [(1, 1)]]
    first, second = run(case, prompts, tables, [0, 36], steps)
    np.testing.assert_allclose(first, reference["logits"][:36], atol=1e-4, rtol=0)
    np.testing.assert_allclose(second, reference["logits"][36:37], atol=1e-4, rtol=0)


def test_an_aborted_requests_token_does_not_reach_the_next_of_its_name():
    """Its step is still in flight when the name is used again."""
    options = dict(dtype="float32", page_size=4, max_model_len=LENGTH, skip_tokenizer_init=True, warmup=False)
    engine = LLM(MODELS / "llama_gqa", **options).engine
    first, second, _ = golden("llama_gqa")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add_request(first["prompt"].tolist(), params, request_id="same")
    engine.step()
    engine.abort("same")
    engine.add_request(second["prompt"].tolist(), params, request_id="same")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == generated("llama_gqa")[1][:5]
