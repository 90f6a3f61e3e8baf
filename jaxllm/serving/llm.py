"""The Python API: `LLM(...).generate(...)`, named after vLLM's."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.serving.beam import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from jaxllm.serving.bundle import bundle_settings
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.engine import Engine
from jaxllm.serving.logits import LogitsProcessor
from jaxllm.serving.pooling import EmbeddingRequestOutput, as_embedding, embedding_params
from jaxllm.serving.progress import ProgressLine
from jaxllm.serving.prompt import Prompt, need_tokenizer, read_labels, read_prompt
from jaxllm.serving.request import RequestOutput, SamplingParams
from jaxllm.tokenizers import Tokenizer


class LLM:
    """A model ready to generate.

        llm = LLM("demo")
        print(llm.generate("The capital of France is", SamplingParams(temperature=0)).pop().outputs[0].text)

    Takes the fields of `EngineConfig` as keywords, and `logits_processors`: functions in JAX by name, which requests may ask
    for (`SamplingParams.logits_processor`; `logits.LogitsProcessor`). Raises ConfigError, CheckpointError or TokenizerError.
    """

    def __init__(self, model: str | os.PathLike, *, logits_processors: Mapping[str, LogitsProcessor] | None = None, **options: Any):
        from jaxllm.config import from_dict

        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if isinstance(options.get("adapter"), os.PathLike):
            options["adapter"] = os.fspath(options["adapter"])
        self.config = from_dict(EngineConfig, {"model": model, **bundle_settings(options), **options}, where="LLM(...)")
        self.engine = Engine(self.config, logits_processors)
        # The newest output of each request of ours, until it is taken: a stream may be read while another call drives the engine.
        self._news: dict[str, RequestOutput | None] = {}

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent on loading, and on compiling so far."""
        return {"load_s": self.engine.load_s, "compile_s": self.engine.runner.stats.compile_s}

    def get_tokenizer(self) -> Tokenizer:
        return need_tokenizer(self.engine.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts, all together; outputs come in the order of the prompts. `use_tqdm` (vLLM's name for it): say on
        standard error how many are done, if that is a terminal.

        A prompt is a string, `{"prompt": str}` or `{"prompt_token_ids": [int]}`; a dict may have a `cache_salt` too: the prompt
        then shares the KV cache with those of the same salt only; and a `tenant`, for policies that share out by it. One
        SamplingParams serves all, or each has its own. Raises RequestError, before anything has run, if any of them is wrong.
        """
        prompts = [prompts] if isinstance(prompts, (str, dict)) else _as_list(prompts, "prompts must be a prompt or a list of them")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each = [sampling_params or SamplingParams()] * len(prompts)
        else:
            each = _as_list(sampling_params, "sampling_params must be a SamplingParams or a list of them")
            if len(each) != len(prompts):
                raise RequestError(f"{len(prompts)} prompts came with {len(each)} sampling_params: give one for all, or one for each")
        ids: list[str] = []
        try:
            for prompt, params in zip(prompts, each, strict=True):
                ids.append(self._add(prompt, params))
            waiting, progress = ids, ProgressLine("generating", "prompts")
            while waiting:
                self._step()
                waiting = [i for i in waiting if self._news[i] is None or not self._news[i].finished]
                if use_tqdm:
                    progress(len(ids) - len(waiting), len(ids))
            return [self._news[i] for i in ids]
        finally:  # a bad prompt or an interrupt leaves nothing behind
            for request_id in ids:
                self._forget(request_id)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several. Further keywords go to `Tokenizer.apply_chat_template` (`tools`, ...)."""
        messages = _as_list(messages, "messages must be a list of messages (dicts), or a list of such lists")
        conversations = [messages] if not messages or isinstance(messages[0], dict) else messages
        tokenizer = self.get_tokenizer()
        return self.generate(
            [{"prompt_token_ids": tokenizer.apply_chat_template(m, **template)} for m in conversations], sampling_params, use_tqdm=use_tqdm
        )

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "last", use_tqdm: bool = True) -> list[EmbeddingRequestOutput]:
        """A vector of length 1 for each prompt: the final hidden state of its `last` token, or the `mean` of all tokens'.

        A prompt may have one token less than max_model_len. Raises RequestError.
        """
        prompts = [prompts] if isinstance(prompts, (str, dict)) else _as_list(prompts, "prompts must be a prompt or a list of them")
        named = ({"prompt": p} if isinstance(p, str) else p for p in prompts)
        pooled = [p | {"pooling": pooling} if isinstance(p, dict) else p for p in named]
        return [as_embedding(output) for output in self.generate(pooled, embedding_params(), use_tqdm=use_tqdm)]

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Continues prompts by beam search; see `beam`. Raises RequestError."""
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"params must be BeamSearchParams, not {type(params).__name__}")
        tokenizer, results = self.engine.tokenizer, []
        for output in self.generate(prompts, params.sampling_params()):
            sequences = []
            for o in output.outputs:
                tokens = output.prompt_token_ids + o.token_ids
                known = [] if tokenizer is None else [token for token in tokens if tokenizer.has_token(token)]
                text = None if tokenizer is None else tokenizer.decode(known, skip_special_tokens=params.skip_special_tokens)
                sequences.append(BeamSearchSequence(tokens, o.logprobs, o.cumulative_logprob, text, o.finish_reason, o.stop_reason))
            results.append(BeamSearchOutput(sequences))
        return results

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continues one prompt, yielding all that there is so far whenever there is more. Closing the iterator aborts it."""
        outputs = self._follow(prompt, SamplingParams() if sampling_params is None else sampling_params)
        next(outputs)  # up to the first yield: a bad request is refused now, and a stream that nobody reads is cleaned up
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forgets all that earlier requests left in the KV cache."""
        self.engine.reset_prefix_cache()

    def _follow(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        request_id = self._add(prompt, params)
        try:
            yield None
            finished = False
            while not finished:
                while (output := self._news[request_id]) is None:
                    self._step()
                self._news[request_id] = None
                finished = output.finished
                yield output
        finally:
            self._forget(request_id)

    def _step(self) -> None:
        if not self.engine.has_work:
            raise RequestError("the request was aborted: there is nothing to wait for")
        for output in self.engine.step():
            if output.request_id in self._news:
                self._news[output.request_id] = output

    def _forget(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._news.pop(request_id, None)

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        text, ids = read_prompt(prompt, params, self.engine.tokenizer)
        request_id = self.engine.add_request(ids, params, prompt=text, **read_labels(prompt))
        self._news[request_id] = None
        return request_id


def _as_list(value: Iterable[Any], must: str) -> list[Any]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise RequestError(f"{must}, not {value!r:.100}")
    return list(value)
