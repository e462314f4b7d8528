"""Every 'auto' of the config decided for this machine and this model. Called by ``rank``; loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from outrider.config import EngineConfig
from outrider.errors import ConfigError
from outrider.kernels.attention_decode import MAX_GROUP
from outrider.models.config import ModelConfig

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


class Defaults(NamedTuple):
    """What a kind of device gets unless it is told: ``prefill_share_tokens`` are prompt tokens beside decodes."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_share_tokens: int


GPU = Defaults(64, 512, 8192, 512)
"""The share of 512 is what the cost model of ``benchmarks.policies``, measured on an H200, gave best (docs/adr/0009).

2026-11-27, FP8 / NVFP4, 512 requests at once: 4,482 / 6,836 tok/s, with whole steps of 8,192 4,452 / 6,573
(benchmarks/results/policies.json). The others are not tuned; blocks are one ``DecodeTile`` long.
"""

CPU = Defaults(16, 256, 512, 128)
"""Not tuned."""


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
    if on_gpu and model.num_heads > MAX_GROUP * model.num_kv_heads:
        raise ConfigError(
            f"{model.num_heads} query heads on {model.num_kv_heads} key and value heads are more than {MAX_GROUP} "
            "on one, which the GPU kernels cannot take; use --device cpu."
        )
    if config.deterministic and on_gpu:
        _check_deterministic(config, model)
    dtype = _dtype(config, model, on_gpu)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {model.max_position_embeddings} positions."
        )
    defaults = GPU if on_gpu else CPU
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    budget = config.max_num_batched_tokens or defaults.max_num_batched_tokens
    if budget < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {budget} must be at least --max-num-seqs {max_num_seqs}, "
            "so that every running sequence can advance in a step."
        )
    share = min(budget, config.prefill_share_tokens or defaults.prefill_share_tokens)
    return Resolved(
        device=device,
        dtype=dtype,
        kv_dtype=_kv_dtype(config, model, dtype),
        block_size=config.block_size or defaults.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        prefill_share_tokens=share,
    )


def _check_deterministic(config: EngineConfig, model: ModelConfig) -> None:
    """What ``--deterministic`` does not cover on a GPU is refused."""
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        raise ConfigError(
            "--deterministic works on one GPU; drop it, or --tensor-parallel-size and its like."
        )
    if model.quant is not None and model.quant.algo == "NVFP4":
        raise ConfigError(
            "--deterministic does not cover NVFP4 on a GPU; drop it, or take the FP8 checkpoint."
        )
    if model.vision is not None and not config.language_model_only:
        raise ConfigError("--deterministic does not cover images on a GPU; add --language-model-only.")


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
