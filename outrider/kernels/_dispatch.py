"""Which implementation an op takes: Triton on a CUDA tensor, plain torch elsewhere.

Every kernel file calls ``on_gpu``; nothing else decides. The file never imports a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

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


_NUM_COUNTERS = 1 << 16
_lane = 0


@contextmanager
def second_lane() -> Iterator[None]:
    """Within, kernels are launched beside others that may be running, and count arrivals apart from them."""
    global _lane
    _lane = 1
    try:
        yield
    finally:
        _lane = 0


def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeroed counters for split-K tiles; every kernel that uses them leaves them at zero."""
    return _counters(device)[_lane]


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros((2, _NUM_COUNTERS), dtype=torch.int32, device=device)
