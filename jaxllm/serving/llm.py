"""The Python API: `LLM(...).generate(...)`, named after vLLM's."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.errors import RequestError
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.engine import Engine, get_tokenizer
from jaxllm.serving.request import RequestOutput, SamplingParams
from jaxllm.tokenizers import Tokenizer

Prompt = str | dict[str, Any]


class LLM:
    """A model ready to generate.

        llm = LLM("demo")
        print(llm.generate("The capital of France is", SamplingParams(temperature=0)).pop().outputs[0].text)

    Takes the fields of `EngineConfig` as keywords. Raises ConfigError, CheckpointError or TokenizerError.
    """

    def __init__(self, model: str, **options: Any):
        from jaxllm.config import from_dict

        self.config = from_dict(EngineConfig, {"model": str(model), **options}, where="LLM(...)")
        self.engine = Engine(self.config)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent on loading, and on compiling so far."""
        return {"load_s": self.engine.load_s, "compile_s": self.engine.runner.stats.compile_s}

    def get_tokenizer(self) -> Tokenizer:
        return get_tokenizer(self.engine)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continues prompts, all together; outputs come in the order of the prompts.

        A prompt is a string, `{"prompt": str}` or `{"prompt_token_ids": [int]}`. One SamplingParams serves all, or each has its
        own. Raises RequestError, before anything has run, if any of them is wrong.
        """
        prompts = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each = [sampling_params or SamplingParams()] * len(prompts)
        else:
            each = list(sampling_params)
            if len(each) != len(prompts):
                raise RequestError(f"{len(prompts)} prompts came with {len(each)} sampling_params: give one for all, or one for each")
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(prompts, each, strict=True):
                ids.append(self._add(prompt, params))
            waiting = set(ids)
            while waiting:
                for output in self.engine.step():
                    if output.finished and output.request_id in waiting:
                        waiting.remove(output.request_id)
                        done[output.request_id] = output
        finally:  # a bad prompt or an interrupt leaves nothing behind
            for request_id in ids:
                self.engine.abort(request_id)
        return [done[i] for i in ids]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several. Further keywords go to `Tokenizer.apply_chat_template` (`tools`, ...)."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        tokenizer = self.get_tokenizer()
        return self.generate([{"prompt_token_ids": tokenizer.apply_chat_template(m, **template)} for m in conversations], sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continues one prompt, yielding all that there is so far whenever there is more. Closing the iterator aborts it."""
        request_id = self._add(prompt, sampling_params or SamplingParams())
        return self._follow(request_id)

    def _follow(self, request_id: str) -> Iterator[RequestOutput]:
        try:
            while True:
                for output in self.engine.step():
                    if output.request_id == request_id:
                        yield output
                        if output.finished:
                            return
        finally:
            self.engine.abort(request_id)

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be a SamplingParams, not {type(params).__name__}")
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, dict) or set(prompt) not in ({"prompt"}, {"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
            raise RequestError(f"a prompt is a string, {{'prompt': ...}} or {{'prompt_token_ids': [...]}}, not {prompt!r:.200}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None:
            ids = self.get_tokenizer().encode(text)
        elif isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise RequestError(f"prompt_token_ids must be a list of token ids, not {type(ids).__name__}")
        return self.engine.add_request(ids, params, prompt=text)
