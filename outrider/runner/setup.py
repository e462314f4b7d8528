"""From a config to a running engine: resolve, plan memory, load, warm up. Called once by the engine process.

Every choice made here is in the ``EngineInfo`` that comes back: nothing falls back in silence.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.kv_manager import KVManager
from outrider.engine.scheduler import Limits, Scheduler
from outrider.errors import ConfigError
from outrider.kernels import op_table
from outrider.kv_layout import KVLayout, plan_layout
from outrider.models.config import ModelConfig
from outrider.models.registry import Model, build_model, load_model_config, load_weights
from outrider.parallel import Parallel
from outrider.runner.executor import InlineExecutor
from outrider.runner.graphs import DecodeGraphs
from outrider.runner.images import ImageStore
from outrider.runner.kv_cache import KVCache
from outrider.runner.model_runner import ModelRunner
from outrider.runner.warmup import measure_activations, warm_up
from outrider.types import EngineInfo

logger = logging.getLogger("outrider.engine")

ProgressCallback = Callable[[str, int, int], None]

GIB = 1 << 30
CPU_KV_BYTES = 2 * GIB
GRAPH_RESERVE_BYTES = GIB
"""Kept free for CUDA graphs and the allocator's rounding."""

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """An ``EngineConfig`` with every 'auto' decided for this machine and model."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefill_share_tokens: int


def resolve(config: EngineConfig, model: ModelConfig) -> Resolved:
    """Decide what was left to us; ``ConfigError`` where a wish cannot be met."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu.")
    device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
    on_gpu = device.type == "cuda"
    dtype = _dtype(config, model, on_gpu)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {model.max_position_embeddings} positions."
        )
    max_num_seqs = config.max_num_seqs or (512 if on_gpu else 64)
    budget = config.max_num_batched_tokens or (8192 if on_gpu else 512)
    if budget < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {budget} must be at least --max-num-seqs {max_num_seqs}, "
            "so that every running sequence can advance in a step."
        )
    return Resolved(
        device=device,
        dtype=dtype,
        kv_dtype=_kv_dtype(config, model, dtype),
        block_size=config.block_size or (64 if on_gpu else 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        prefill_share_tokens=min(budget, 512 if on_gpu else 128),
    )


def _dtype(config: EngineConfig, model: ModelConfig, on_gpu: bool) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    # On a CPU float32 is both exact to the reference and, without AMX, faster than bfloat16 (docs/log.md).
    return DTYPES[model.dtype] if on_gpu else torch.float32


def _kv_dtype(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    wish = config.kv_cache_dtype
    if wish in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    if wish == "auto":
        stored_fp8 = model.quant is not None and (model.quant.kv_cache_algo or "").upper() == "FP8"
        return torch.float8_e4m3fn if stored_fp8 else dtype
    return DTYPES[wish]


def build_engine(config: EngineConfig, on_progress: ProgressCallback) -> tuple[Engine, EngineInfo]:
    """Load the model of a single rank and put an engine around it."""
    clock = _Ledger()
    model_config = load_model_config(config.model)
    resolved = resolve(config, model_config)
    if resolved.device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build_model(
        model_config,
        Parallel(),
        dtype=resolved.dtype,
        device=resolved.device,
        kv_cache_dtype=resolved.kv_dtype,
        language_model_only=config.language_model_only,
        quantization=config.quantization,
    )
    clock.mark("build")
    load_weights(model, config.model, config.load_format, lambda d, t: on_progress("weights", d, t))
    clock.mark("weights")
    resolved, layout, num_blocks = plan_kv(config, model_config, resolved, model)
    kv = KVCache(
        layout, num_blocks, model.kv_heads_per_rank, model_config.head_dim, resolved.kv_dtype, resolved.device
    )
    clock.mark("kv cache")
    runner = _runner(config, model_config, resolved, model, kv)
    clock.mark("warm-up")
    scheduler = Scheduler(
        KVManager(layout, num_blocks, config.enable_prefix_caching),
        Limits(
            resolved.max_num_seqs,
            resolved.max_num_batched_tokens,
            resolved.prefill_share_tokens,
            config.scheduling_policy == "priority",
        ),
    )
    depth = 2 if config.async_scheduling else 1
    engine = Engine(scheduler, InlineExecutor(runner), None, depth)
    return engine, _info(config, model_config, resolved, model, kv, scheduler, clock)


def _runner(
    config: EngineConfig, model_config: ModelConfig, resolved: Resolved, model: Model, kv: KVCache
) -> ModelRunner:
    graphs = None
    if resolved.device.type == "cuda" and not config.enforce_eager:
        graphs = DecodeGraphs(
            model,
            kv,
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=resolved.max_model_len,
            device=resolved.device,
        )
    encode = getattr(model, "encode_images", None) if model_config.vision is not None else None
    runner = ModelRunner(
        model,
        kv,
        num_rows=resolved.max_num_seqs,
        max_model_len=resolved.max_model_len,
        vocab_size=model_config.vocab_size,
        device=resolved.device,
        graphs=graphs,
        images=ImageStore(encode, resolved.device) if encode is not None else None,
    )
    warm_up(runner, resolved.max_num_batched_tokens)
    if graphs is not None:
        graphs.capture_start_sizes()
    return runner


def plan_kv(
    config: EngineConfig, model_config: ModelConfig, resolved: Resolved, model: Model
) -> tuple[Resolved, KVLayout, int]:
    """Layout and number of blocks; a default context length shrinks to what fits, an explicit one is refused."""
    budget = _kv_budget(config, model_config, resolved, model)
    while True:
        layout = plan_layout(
            model_config.rope_layers,
            model_config.attention_chunk_size,
            resolved.max_model_len,
            resolved.block_size,
        )
        block_bytes = KVCache.bytes_per_block(
            layout, model.kv_heads_per_rank, model_config.head_dim, resolved.kv_dtype.itemsize
        )
        num_blocks = config.num_gpu_blocks_override or int(budget // block_bytes)
        needed = KVManager(layout, 2, False).num_blocks_for(resolved.max_model_len) + 1
        if num_blocks >= needed:
            return resolved, layout, num_blocks
        fitting = int(resolved.max_model_len * (num_blocks - 1) / needed) // resolved.block_size
        if config.max_model_len is not None or fitting < 1:
            raise ConfigError(
                f"One request of --max-model-len {resolved.max_model_len} needs "
                f"{needed * block_bytes / GIB:.2f} GiB of KV cache and {num_blocks * block_bytes / GIB:.2f} GiB fit; "
                f"use --max-model-len {max(fitting, 0) * resolved.block_size}, more memory, or an fp8 KV cache."
            )
        shorter = fitting * resolved.block_size
        logger.info("The KV cache holds no full-length request; --max-model-len is set to %d.", shorter)
        resolved = _with_length(resolved, shorter)


def _with_length(resolved: Resolved, max_model_len: int) -> Resolved:
    import dataclasses

    return dataclasses.replace(resolved, max_model_len=max_model_len)


def _kv_budget(config: EngineConfig, model_config: ModelConfig, resolved: Resolved, model: Model) -> int:
    """Bytes for the KV cache."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if resolved.device.type == "cpu":
        return CPU_KV_BYTES
    peak = measure_activations(model, model_config, resolved)
    total = torch.cuda.get_device_properties(resolved.device).total_memory
    return int(total * config.gpu_memory_utilization) - peak - GRAPH_RESERVE_BYTES


class _Ledger:
    """Start-up times by stage, in seconds."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """The stage ends here."""
        now = time.perf_counter()
        self.stages[stage] = round(now - self._last, 3)
        self._last = now


def _info(
    config: EngineConfig,
    model_config: ModelConfig,
    resolved: Resolved,
    model: Model,
    kv: KVCache,
    scheduler: Scheduler,
    clock: _Ledger,
) -> EngineInfo:
    per_request = scheduler.kv.num_blocks_for(resolved.max_model_len)
    concurrency = scheduler.kv.pool.capacity / per_request
    on_gpu = resolved.device.type == "cuda"
    return EngineInfo(
        model=config.model,
        architecture=model_config.architecture,
        device=torch.cuda.get_device_name() if on_gpu else f"cpu ({torch.get_num_threads()} threads)",
        dtype=str(resolved.dtype).removeprefix("torch."),
        quantization=model.quantization,
        kv_cache_dtype=str(resolved.kv_dtype).removeprefix("torch."),
        kernels=op_table(resolved.device),
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        num_blocks=kv.num_blocks,
        kv_capacity_tokens=int(concurrency * resolved.max_model_len),
        max_concurrency=round(concurrency, 2),
        startup_s=clock.stages,
        weights_gb=round(model.weight_bytes() / 1e9, 3),
    )
