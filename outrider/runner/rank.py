"""One rank's start: load its part of the model, say how much KV cache it has room for, then make its runner.

Called by ``setup`` in the engine's process (one rank) and by ``worker`` (one process per rank). The two steps are
apart because every rank must hold the same number of blocks, which is known only when all have loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.config import EngineConfig
from outrider.kernels.invariant import make_invariant
from outrider.kv_layout import KVLayout
from outrider.models.config import ModelConfig
from outrider.models.config_hf import check_quantization, load_model_config
from outrider.models.decoder import Decoder
from outrider.models.llama4 import Llama4
from outrider.models.memory import check_fits
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.runner.graphs import StepGraphs
from outrider.runner.images import ImageStore
from outrider.runner.kv_cache import KVCache
from outrider.runner.ledger import Ledger
from outrider.runner.model_runner import ModelRunner
from outrider.runner.resolve import Resolved, resolve
from outrider.runner.warmup import compile_kernels, measure_activations, warm_up

GIB = 1 << 30
CPU_KV_BYTES = 2 * GIB
"""At most this, and a quarter of the memory: every page becomes resident in time, since old prefixes are kept."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
RESERVED_BYTES = int(1.8 * GIB)
"""Kept free of weights, activations and KV cache. H200, 2026-11-26, Scout: CUDA and the loaded kernels take 0.75 GiB,
74 graphs 0.6 GiB, and what these compute 0.6 GiB, of which 0.15 fit into what the probe of activations leaves."""


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank with its weights in place and no KV cache yet."""

    config: EngineConfig
    model_config: ModelConfig
    resolved: Resolved
    parallel: Parallel
    model: Decoder
    kv_budget: int

    def block_bytes(self, layout: KVLayout) -> int:
        """Memory of one KV block on this rank."""
        return KVCache.bytes_per_block(
            layout,
            self.model.kv_heads_per_rank,
            self.model_config.head_dim,
            self.resolved.kv_dtype.itemsize,
        )


def load_rank(
    config: EngineConfig, parallel: Parallel, progress: Callable[[int, int], None], clock: Ledger
) -> LoadedRank:
    """Build the model, load this rank's weights and measure what is left."""
    model_config = load_model_config(config.model)
    check_quantization(config.quantization, model_config)
    resolved = resolve(config, model_config)
    if resolved.device.type == "cpu":
        threads = len(os.sched_getaffinity(0)) // (parallel.tp_size * parallel.pp_size)
        torch.set_num_threads(max(1, threads))
        _keep_freed_memory()
    check_fits(
        model_config,
        parallel,
        dtype=resolved.dtype,
        kv_dtype=resolved.kv_dtype,
        # A default context length shrinks to what fits; one that was asked for must fit.
        max_model_len=resolved.block_size if config.max_model_len is None else resolved.max_model_len,
        usable_bytes=_usable_bytes(config, resolved),
        tables_apart=resolved.device.type == "cuda",
    )
    clock.mark("device")
    if config.deterministic:
        make_invariant(resolved.device)
    model = load_model(
        model_config,
        config.model,
        parallel,
        load_format=config.load_format,
        dtype=resolved.dtype,
        device=resolved.device,
        kv_cache_dtype=resolved.kv_dtype,
        language_model_only=config.language_model_only,
        progress=progress,
    )
    if resolved.device.type == "cuda":
        torch.cuda.empty_cache()  # what a load converted leaves holes behind
    clock.mark("weights")
    if resolved.device.type == "cuda":
        compile_kernels(model, model_config, resolved)
        clock.mark("kernels")
    budget = _kv_budget(config, model_config, resolved, model)
    clock.mark("memory probe")
    return LoadedRank(config, model_config, resolved, parallel, model, budget)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed buffers: giving them back costs page faults on every step (4x in decode attention)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_MMAP_THRESHOLD, 2**30)


def _usable_bytes(config: EngineConfig, resolved: Resolved) -> int:
    """What weights and KV cache may take of this rank's memory."""
    if resolved.device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(resolved.device).total_memory
    return int(total * config.gpu_memory_utilization) - RESERVED_BYTES


def _kv_budget(config: EngineConfig, model_config: ModelConfig, resolved: Resolved, model: Decoder) -> int:
    """Bytes for the KV cache of this rank."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if resolved.device.type == "cpu":
        return min(CPU_KV_BYTES, _usable_bytes(config, resolved) // 4)
    peak = measure_activations(model, model_config, resolved)
    return _usable_bytes(config, resolved) - peak


def start_rank(
    rank: LoadedRank, layout: KVLayout, num_blocks: int, max_model_len: int, clock: Ledger
) -> ModelRunner:
    """Allocate the KV cache, make the runner, compile every kernel and capture the usual graphs."""
    resolved, model = rank.resolved, rank.model
    kv = KVCache(
        layout,
        num_blocks,
        model.kv_heads_per_rank,
        rank.model_config.head_dim,
        resolved.kv_dtype,
        resolved.device,
    )
    graphs = None
    # Captures with collectives in them have not been seen to work yet.
    one_rank = rank.parallel.tp_size * rank.parallel.pp_size == 1
    if resolved.device.type == "cuda" and not rank.config.enforce_eager and one_rank:
        graphs = StepGraphs(
            model,
            kv,
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=max_model_len,
            prefill_share=resolved.prefill_share_tokens,
            device=resolved.device,
        )
    runner = ModelRunner(
        model,
        kv,
        num_rows=resolved.max_num_seqs,
        max_model_len=max_model_len,
        vocab_size=rank.model_config.vocab_size,
        device=resolved.device,
        parallel=rank.parallel,
        graphs=graphs,
        images=_image_store(model, resolved.device),
    )
    # A CPU compiles nothing: a few tokens touch every path.
    warm_up(runner, resolved.max_num_batched_tokens if resolved.device.type == "cuda" else 8)
    clock.mark("warm-up")
    if graphs is not None:
        graphs.capture_start_shapes()
        clock.mark("graphs")
    return runner


def _image_store(model: Decoder, device: torch.device) -> ImageStore | None:
    if isinstance(model, Llama4) and model.vision is not None:
        return ImageStore(model.encode_images, device)
    return None
