"""Kernels, one operation a file: contract, plain-torch reference, Triton kernel, launcher.

Called by ``models``, ``quant`` and the runner's sampler. Imports torch and triton, and nothing of outrider outside
this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_OPS = {
    "embedding": ("triton, table in host memory unless tied", "torch"),
    "attention": ("triton split-kv + ragged prefill", "torch sdpa"),
    "norm, rope, activation": ("triton fused", "torch"),
    "gemm": ("cublaslt + triton few-rows", "torch"),
    "moe": ("triton grouped", "torch per expert"),
    "sampling": ("triton", "torch"),
}


def op_table(device: torch.device) -> dict[str, str]:
    """The implementation of every operation on ``device``; nothing falls back from it."""
    from outrider.kernels.nvfp4 import nvfp4_path

    table = {op: names[device.type != "cuda"] for op, names in _OPS.items()}
    return table | {"nvfp4": nvfp4_path(device).value}
