"""However a prompt is cut into chunks, and whoever shares their steps, its logits are those of the whole."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import MODELS, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.checkpoints import open_checkpoint
from jaxllm.checkpoints.load import load_model
from jaxllm.serving.attend import paged_attend
from jaxllm.sharding import ShardingRules, make_mesh

PAGE, TOKENS = 4, 72  # of a page, and of the one shape that all steps are padded to
PAGES = 40


@lru_cache(maxsize=1)
def compiled(case):
    """logits of every token of a step, and the pages after it."""
    mesh, rules = make_mesh(), ShardingRules()
    model = load_model(open_checkpoint(MODELS / case), dtype=jnp.float32, mesh=mesh, rules=rules)
    c = model.config

    @jax.jit
    def step(kv_pages, tokens, positions, rope_lengths, table, kv_lens, starts, counts):
        decoder = nnx.merge(model.graph, model.params)
        attend = paged_attend(table, kv_lens, starts, counts, num_pages=PAGES, mesh=mesh, rules=rules, decode_only=False)
        hidden, kv_pages = decoder(tokens, positions, attend, kv_pages, rope_lengths=rope_lengths)
        return decoder.logits(hidden), kv_pages

    return step, jnp.zeros((c.num_layers * PAGES, 2, c.num_kv_heads, PAGE, c.head_dim))


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2", "gemma3_text", "gpt2", "llama_rope_dynamic", "phi3_longrope"])
@settings(max_examples=12)
@given(data=st.data())
def test_any_chunking_gives_the_same_logits(case, data):
    step, kv_pages = compiled(case)
    prompts = golden(case)
    order = data.draw(st.permutations(range(1, PAGES)), label="pages")
    tables = np.zeros((3, 12), np.int32)
    for n, row in enumerate(tables):
        row[:] = order[12 * n : 12 * n + 12]
    done, logits = [0, 0, 0], [[], [], []]
    while any(done[n] < len(p["prompt"]) for n, p in enumerate(prompts)):
        left = [len(p["prompt"]) - d for p, d in zip(prompts, done, strict=True)]
        chunks = {n: data.draw(st.integers(0, left[n]), label=f"chunk of {n}") for n in range(3) if left[n]}
        chunks = {n: count for n, count in chunks.items() if count} or {next(iter(chunks)): 1}
        chosen = sorted(chunks, key=lambda n: chunks[n] > 1)  # those with one token come first
        tokens, positions, lengths = (np.zeros(TOKENS, np.int32) for _ in range(3))
        table, kv_lens, starts, row = np.zeros((3, 12), np.int32), np.zeros(3, np.int32), np.zeros(4, np.int32), 0
        for i, n in enumerate(chosen):
            rows, span = slice(row, row + chunks[n]), slice(done[n], done[n] + chunks[n])
            tokens[rows], positions[rows] = prompts[n]["prompt"][span], np.arange(span.start, span.stop)
            lengths[rows] = len(prompts[n]["prompt"])
            table[i], kv_lens[i], row = tables[n], span.stop, row + chunks[n]
            starts[i + 1 :] = row
        counts = np.array([sum(chunks[n] == 1 for n in chosen), len(chosen)], np.int32)
        out, kv_pages = step(kv_pages, tokens, positions, lengths, table, kv_lens, starts, counts)
        for i, n in enumerate(chosen):
            logits[n].append(out[starts[i] : starts[i + 1]])
            done[n] += chunks[n]
    for ours, reference in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(np.concatenate(ours), reference["logits"], atol=1e-4, rtol=0)
