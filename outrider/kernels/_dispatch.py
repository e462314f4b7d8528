"""Which implementation an op takes: Triton on a CUDA tensor, plain torch elsewhere.

Every kernel file calls ``on_gpu``; nothing else decides. The file never imports a kernel.
"""

from __future__ import annotations

import functools

import torch
from triton import knobs


def on_gpu(x: torch.Tensor) -> bool:
    """Whether ``x`` takes the Triton path. CPU tensors always take the reference path."""
    return x.is_cuda


def interpreted() -> bool:
    """Whether Triton runs its interpreter (``TRITON_INTERPRET=1``), where inline assembly does not exist."""
    return bool(knobs.runtime.interpret)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of ``device``; 4 on a CPU, so that interpreted persistent grids still wrap around."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up, for non-negative ``a``."""
    return -(-a // b)


def power_of_two_at_least(n: int, low: int) -> int:
    """The smallest power of two that is at least ``n`` and at least ``low``."""
    return max(low, 1 << max(n - 1, 0).bit_length())


@functools.cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeroed counters for split-K tiles; every kernel that uses them leaves them at zero."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)
