"""From an EngineConfig to something that can run: devices, weights, limits, the size of the KV cache."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from jaxllm.adapters import merge_into, read_adapter_config
from jaxllm.checkpoints import open_checkpoint, resolve_model
from jaxllm.checkpoints.load import load_model
from jaxllm.errors import ConfigError
from jaxllm.models import ModelConfig, config_from_hf
from jaxllm.paths import cache_dir
from jaxllm.serving.config import EngineConfig
from jaxllm.serving.defaults import default_batched_tokens, default_dtype, default_page_size, pool_pages, scans_layers
from jaxllm.serving.find_tokenizer import read_tokenizer
from jaxllm.serving.kv_cache import cache_dtype, num_cache_heads, page_bytes
from jaxllm.serving.logits import LogitsProcessor
from jaxllm.serving.runner import Runner
from jaxllm.serving.scheduler import SchedulerConfig
from jaxllm.sharding import ShardingRules, fit_to_model, make_mesh
from jaxllm.sharding.chips import TPUS
from jaxllm.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """What an engine is made of. Times in seconds. `exact`: a token's bits are the same in every shape of a step."""

    runner: Runner
    limits: SchedulerConfig
    num_pages: int
    host_pages: int
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    load_s: float
    exact: bool


def load(config: EngineConfig, processors: Mapping[str, LogitsProcessor] | None = None) -> Loaded:
    """Finds, reads and places the model, and sizes the page pool. Compiles nothing."""
    start = time.perf_counter()
    mesh = make_mesh(tensor=config.tensor_parallel_size)
    platform = mesh.devices.flat[0].platform
    on_cpu = platform == "cpu"
    _check_libtpu(mesh.devices.flat[0].device_kind)
    path = resolve_model(config.model)
    source = open_checkpoint(path)
    dtype = jnp.dtype(default_dtype(platform, source.config) if config.dtype == "auto" else config.dtype)
    scan = config.scan_layers if config.scan_layers is not None else scans_layers(platform)
    if config.adapter is not None:
        read_adapter_config(config.adapter)  # what is wrong with it is said before the weights are read
    model_config = config_from_hf(source.config)
    rules = fit_to_model(ShardingRules(), model_config, mesh)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(read_tokenizer, config)  # while weights are read
        # What is wrong with the tokenizer is raised at the next tensor, not when all have been read.
        check = lambda _: loading.done() and loading.result()
        model = load_model(source, dtype=dtype, mesh=mesh, rules=rules, scan_layers=scan, progress=check)
        tokenizer = loading.result()
    if config.adapter is not None:
        model = merge_into(model, config.adapter, base_model=config.model)

    kv_dtype = cache_dtype(config.kv_cache_dtype, dtype)
    page_size = config.page_size or default_page_size(platform)
    a_page = page_bytes(model_config, num_cache_heads(model_config, rules, mesh), page_size, kv_dtype, mesh)
    max_model_len = _max_model_len(config, model_config)
    num_pages = _num_pages(config, mesh, a_page, page_size, max_model_len)
    if (holds := (num_pages - 1) * page_size) < max_model_len:
        if config.max_model_len is not None:
            raise ConfigError(
                f"the KV cache has room for {holds} tokens, and max_model_len={max_model_len} needs "
                f"{a_page * -(-max_model_len // page_size) >> 20} MiB: lower max_model_len, or raise kv_cache_memory_bytes or num_pages"
            )
        logger.warning("max_model_len is %d, not the model's %d: the KV cache has no room for more", holds, max_model_len)
        max_model_len = holds
    host_pages = _num_host_pages(config, model_config, a_page)
    batched = config.max_num_batched_tokens or default_batched_tokens(platform, config.max_num_seqs)
    longrope = [r.original_max_positions for r in model_config.ropes.values() if r.kind == "longrope"]
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched,
        max_model_len=max_model_len,
        page_size=page_size,
        recompute_beyond=longrope[0] if longrope else None,
        policy=config.scheduling_policy,
        policy_options=config.scheduling_policy_options,
    )
    runner = Runner(
        model,
        limits,
        num_pages=num_pages,
        dtype=dtype,
        kv_dtype=kv_dtype,
        attention_backend=config.attention_backend,
        mesh=mesh,
        rules=rules,
        # Nothing but a lone sequence that takes nothing from others is sure never to meet another number of rows.
        one_row=config.max_num_seqs == 1 and not config.enable_prefix_caching,
        max_logprobs=config.max_logprobs,
        processors=processors,
        cache_dir=_programs_dir(config.compilation_cache_dir),
        bundle=config.bundle,
        host_pages=host_pages,
    )
    eos = tokenizer.eos_token_ids if tokenizer is not None else _as_ids(source.config.get("eos_token_id"))
    exact = on_cpu and dtype == jnp.float32
    return Loaded(runner, limits, num_pages, host_pages, tokenizer, frozenset(eos), time.perf_counter() - start, exact)


def _check_libtpu(device_kind: str) -> None:
    missing = [flags for chip in TPUS.values() if device_kind in chip.device_kinds and (flags := chip.missing_flags())]
    if missing:
        logger.warning("start with LIBTPU_INIT_ARGS='%s': without it every step copies all weights on %s", *missing, device_kind)


def _programs_dir(folder: str | None) -> Path | None:
    """Where compiled programs are kept. Nowhere if that is turned off, or if JAX's own cache is on: it keeps them then, and what it
    has found there cannot be written elsewhere."""
    if folder == "" or jax.config.jax_compilation_cache_dir:
        return None
    return Path(folder) if folder else cache_dir() / "programs"


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    most = model.max_positions
    dynamic = [r.factor for r in model.ropes.values() if r.kind == "dynamic"]
    if config.max_model_len is None:
        return int(most * dynamic[0]) if dynamic else most
    if config.max_model_len > most and not dynamic:
        raise ConfigError(f"max_model_len={config.max_model_len} exceeds the {most} positions that the model was made for")
    return config.max_model_len


def _num_pages(config: EngineConfig, mesh, a_page: int, page_size: int, max_model_len: int) -> int:
    """Pages in the pool, the one that padding points at included."""
    if config.num_pages is not None:
        return config.num_pages + 1
    if config.kv_cache_memory_bytes is not None:
        return max(2, config.kv_cache_memory_bytes // a_page + 1)
    one = -(-max_model_len // page_size)
    room, least = _free_bytes(mesh, config.memory_fraction), one * a_page if config.max_model_len is not None else 0
    return pool_pages(mesh.devices.flat[0].platform, config.max_num_seqs, one, a_page, room=room, least=least)


def _num_host_pages(config: EngineConfig, model: ModelConfig, a_page: int) -> int:
    if not config.host_kv_bytes:
        return 0
    if any(rope.depends_on_length for rope in model.ropes.values()):
        raise ConfigError("host_kv_bytes: this model's keys depend on the length of their sequence, so that its pages cannot be kept")
    if config.host_kv_bytes < a_page:
        raise ConfigError(f"host_kv_bytes={config.host_kv_bytes} is less than one page, which takes {a_page} bytes")
    if config.host_kv_bytes > (room := psutil.virtual_memory().available):
        raise ConfigError(f"host_kv_bytes={config.host_kv_bytes} is more than the {room} bytes of host memory that are free")
    return config.host_kv_bytes // a_page


def _free_bytes(mesh, fraction: float) -> int:
    """Bytes that the KV cache may take on all the mesh's devices together, weights being loaded."""
    devices = list(mesh.devices.flat)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats:
        return int(stats["bytes_limit"] * fraction - stats["bytes_in_use"]) * len(devices)
    return int(psutil.virtual_memory().available * fraction)


def _as_ids(value) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
