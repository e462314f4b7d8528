"""What a model needs before a byte of it is loaded. Called by the runner at start; allocates nothing.

Weights are measured by building the model itself on the ``meta`` device, in the formats that ``config.json``
announces, so there is no second list of shapes to keep true. A model that cannot fit is refused with the
numbers and the nearest settings that would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from outrider.errors import ConfigError
from outrider.models.config import ModelConfig
from outrider.models.dummy import DummySource
from outrider.models.layers import shard_kv_heads
from outrider.models.registry import build_model
from outrider.parallel import Parallel

GIB = 1 << 30
_TENSOR_PARALLEL_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes on one rank: its weights, and the KV cache of one request of ``num_tokens``."""

    weight_bytes: int
    kv_bytes: int
    num_tokens: int

    @property
    def total_bytes(self) -> int:
        """The least memory that can serve one request."""
        return self.weight_bytes + self.kv_bytes


def weight_bytes(
    config: ModelConfig, parallel: Parallel, dtype: torch.dtype, *, tables_apart: bool = False
) -> int:
    """Bytes of this rank's weights, with ``dtype`` for what the checkpoint does not quantize.

    ``tables_apart``: without the tables that a GPU's rank keeps in host memory.
    """
    meta = torch.device("meta")
    model = build_model(config, parallel, DummySource(config), dtype=dtype, device=meta, kv_cache_dtype=dtype)
    return model.builder.num_bytes if tables_apart else model.weight_bytes()


def kv_bytes(config: ModelConfig, parallel: Parallel, kv_dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of one request's keys and values on this rank; layers with chunks keep one chunk at most."""
    chunk = config.attention_chunk_size or num_tokens
    layers = parallel.layer_range(config.num_layers)
    kept = sum(min(num_tokens, chunk) if config.rope_layers[i] else num_tokens for i in layers)
    heads = shard_kv_heads(parallel, config.num_kv_heads)[1]
    return kept * 2 * heads * config.head_dim * kv_dtype.itemsize


def check_fits(
    config: ModelConfig,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    max_model_len: int,
    usable_bytes: int,
    tables_apart: bool = False,
) -> MemoryNeeds:
    """What this rank needs for one request of ``max_model_len``; ``ConfigError`` if ``usable_bytes`` are too few.

    ``usable_bytes`` is what the rank may use for weights and KV cache together; ``tables_apart`` as for
    ``weight_bytes``.
    """

    def needs_of(split: Parallel) -> MemoryNeeds:
        weights = weight_bytes(config, split, dtype, tables_apart=tables_apart)
        return MemoryNeeds(weights, kv_bytes(config, split, kv_dtype, max_model_len), max_model_len)

    needs = needs_of(parallel)
    if needs.total_bytes <= usable_bytes:
        return needs
    advice = _advice(config, parallel, kv_dtype, needs, usable_bytes, needs_of)
    raise ConfigError(
        f"The model does not fit: its weights take {needs.weight_bytes / GIB:.2f} GiB on each device and the KV "
        f"cache of one request of {max_model_len} tokens {needs.kv_bytes / GIB:.2f} GiB, but "
        f"{max(0, usable_bytes) / GIB:.2f} GiB can be used; {advice}."
    )


def _advice(
    config: ModelConfig,
    parallel: Parallel,
    kv_dtype: torch.dtype,
    needs: MemoryNeeds,
    usable_bytes: int,
    needs_of: Callable[[Parallel], MemoryNeeds],
) -> str:
    """The nearest settings that fit: a shorter context, a narrower cache, or more GPUs."""
    options = []
    room = usable_bytes - needs.weight_bytes
    fitting = _longest(config, parallel, kv_dtype, room, needs.num_tokens)
    if fitting > 0:
        options.append(f"--max-model-len {fitting}")
    if kv_dtype.itemsize > 1 and 0 < needs.kv_bytes // kv_dtype.itemsize <= room:
        options.append("--kv-cache-dtype fp8")
    for size in _TENSOR_PARALLEL_SIZES:
        if size > parallel.tp_size and _fits_split(parallel, usable_bytes, size, needs_of):
            options.append(f"--tensor-parallel-size {size}")
            break
    return "use " + " or ".join(options) if options else "use a smaller model or one with fewer bits"


def _longest(config: ModelConfig, parallel: Parallel, kv_dtype: torch.dtype, room: int, upper: int) -> int:
    """The most tokens (at most ``upper``) whose KV cache takes ``room`` bytes; 0 when not even one fits."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes(config, parallel, kv_dtype, middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _fits_split(
    parallel: Parallel, usable_bytes: int, tp_size: int, needs_of: Callable[[Parallel], MemoryNeeds]
) -> bool:
    split = replace(parallel, tp_rank=0, tp_size=tp_size, tp_group=None)
    try:
        return needs_of(split).total_bytes <= usable_bytes
    except ConfigError:  # a dimension of this model has no such divisor
        return False
