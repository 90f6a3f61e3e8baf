"""Outputs that travel as differences arrive as they were sent."""

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.serving.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxllm.serving.wire import OutputReader, OutputWriter

STEP = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3), st.lists(st.integers(0, 99), max_size=3)), max_size=3)


@given(st.lists(STEP, max_size=8), st.integers(1, 3), st.booleans(), st.booleans())
def test_there_as_here(steps, n, with_logprobs, truncated):
    prompt = [1, 2, 3]
    logprobs = [] if with_logprobs else None
    there = [CompletionOutput(i, "", [], logprobs=copy.copy(logprobs)) for i in range(n)]
    scored = [None, {2: Logprob(-1.0)}] if with_logprobs else None
    output = RequestOutput("r", "text", prompt[1:] if truncated else prompt, there, RequestMetrics(1.0), prompt_logprobs=scored)
    writer, reader = OutputWriter(prompt), OutputReader("r", "text", prompt)
    read = []
    for number, step in enumerate(steps):
        for index, text, tokens in step:
            each = there[index % n]
            if each.finished:
                continue
            each.text += text
            each.token_ids += tokens
            if with_logprobs:
                each.logprobs += [{token: Logprob(-0.5, 1, "x")} for token in tokens]
        output.metrics.last_token_time = float(number)
        output.num_cached_tokens = 2
        if number == len(steps) - 1:
            output.finished = True
            for each in there:
                each.finish_reason, each.stop_reason = "stop", "end"
        arrived = reader.output(pickle.loads(pickle.dumps(writer.news(output))))
        assert arrived == output
        read.append((arrived, copy.deepcopy(output)))
    for arrived, sent in read:  # and stay so
        assert arrived == sent
