"""What an engine is told."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jaxllm.errors import ConfigError
from jaxllm.serving.policies import POLICIES, make_policy

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "fp8", "fp8_e4m3"]
AttentionBackend = Literal["auto", "xla", "tpu", "gpu"]


@dataclass(frozen=True)
class EngineConfig:
    """Names follow vLLM's where it has them. None means: chosen from the model and the machine.

    Attributes:
      model: a folder, a `.gguf` file, a hub name (`owner/name`), or `demo`.
      tokenizer: where its tokenizer is, if not with the model.
      adapter: a folder in PEFT's format whose adapter (LoRA, DoRA or IA3) is merged into the weights at load, so that it costs nothing.
      dtype: of weights and KV cache; `auto` is the checkpoint's own on TPU and GPU, and float32 on the CPU.
      kv_cache_dtype: of the KV cache; `auto` is dtype, `fp8` (or `fp8_e4m3`) float8_e4m3fn: half of bfloat16's memory, with four
        significant bits; keys and values are stored as they are (scale 1), those beyond 448 as 448. int8 would need scales that
        checkpoints do not bring, and is refused.
      attention_backend: `auto` takes the device's own kernels where they can do it, and says why where not; `xla` runs everywhere.
      tensor_parallel_size: devices that share each layer.
      max_model_len: tokens of prompt and output together that a request may have.
      max_num_seqs: requests that run at the same time.
      max_num_batched_tokens: tokens in one step.
      page_size: tokens in a page of the KV cache.
      num_pages: pages in the pool; None: `kv_cache_memory_bytes`' worth.
      kv_cache_memory_bytes: None: what `max_num_seqs` requests of full length need, or as much as memory allows.
      memory_fraction: of the device's memory that weights and KV cache may take together.
      scan_layers: run repeated layers in a loop (compiles fast) or unrolled (faster on the CPU).
      warmup: compile every program at start; without it each is compiled when it is first needed.
      warmup_in_background: be ready as soon as the programs are there that can run any step, and compile the rest meanwhile: a step
        may take a larger shape than its own then. None: where that changes no bit of what is generated (float32 on the CPU).
      scheduling_policy: who runs first, and who gives way: `fcfs`, `priority`, ... (docs/scheduling.md).
      scheduling_policy_options: constants of the policy, by name. Those of `mlfq` that are the machine's are measured after the warm-up,
        which is waited for, if they are not given.
      enable_prefix_caching: share the KV cache's pages among requests that begin alike, and keep them for later ones.
      host_kv_bytes: of host memory, for pages that the device's KV cache has no room for: of those who gave up their places, and of
        beginnings that may come again. They are copied back in place of being computed again. 0: none.
      max_logprobs: the most likely tokens that a request may ask the log-probabilities of (`logprobs`, `prompt_logprobs`).
      seed: makes the random numbers of requests that bring no seed of their own reproducible.
      skip_tokenizer_init: no tokenizer: prompts must be token ids, and outputs have no text.
      compilation_cache_dir: where compiled programs are kept between runs (unless JAX caches them); "": nowhere, None: the cache folder.
      bundle: a folder that `jaxllm compile` has made: programs that are in it are not compiled. (They are code: take bundles only from
        where you would take a program from.)
      record: a file for all that the scheduler is told and plans, which `jaxllm simulate --replay` reads (`serving/replay.py`).
    """

    model: str
    tokenizer: str | None = None
    adapter: str | None = None
    dtype: Dtype = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    attention_backend: AttentionBackend = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    memory_fraction: float = 0.9
    scan_layers: bool | None = None
    warmup: bool = True
    warmup_in_background: bool | None = None
    scheduling_policy: str = "fcfs"
    scheduling_policy_options: dict[str, Any] = field(default_factory=dict)
    enable_prefix_caching: bool = True
    host_kv_bytes: int = 0
    max_logprobs: int = 20
    seed: int = 0
    skip_tokenizer_init: bool = False
    compilation_cache_dir: str | None = None
    bundle: str | None = None
    record: str | None = None

    def __post_init__(self):
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must name a folder, a .gguf file, a hub name or 'demo', not {self.model!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
        for name, kind in (("kv_cache_dtype", CacheDtype), ("attention_backend", AttentionBackend)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be {' or '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.scheduling_policy not in POLICIES:
            raise ConfigError(f"scheduling_policy must be {' or '.join(POLICIES)}, not {self.scheduling_policy!r}")
        make_policy(self.scheduling_policy, self.scheduling_policy_options)
        for name in (
            "tensor_parallel_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "num_pages",
            "kv_cache_memory_bytes",
            "max_logprobs",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        fraction = self.memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction!r}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than a token for each of max_num_seqs={self.max_num_seqs}"
            )
        for name, what in (("record", "file"), ("bundle", "folder"), ("adapter", "folder")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} must name a {what}, not {value!r}")
        if isinstance(self.host_kv_bytes, bool) or not isinstance(self.host_kv_bytes, int) or self.host_kv_bytes < 0:
            raise ConfigError(f"host_kv_bytes must be a number of bytes, or 0 for none, not {self.host_kv_bytes!r}")
        if self.host_kv_bytes and not self.enable_prefix_caching:
            raise ConfigError("host_kv_bytes keeps pages by what they hold, as the prefix cache does: it needs enable_prefix_caching")
        if self.num_pages is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_pages and kv_cache_memory_bytes both size the KV cache: give one")
