"""Two chains of kernels at the same time: one on a second CUDA stream, the other where the caller is.

Called by ``models.moe``, whose shared expert needs nothing of the routed ones: each fills the last, half-empty wave of
the other. Safe in CUDA graphs. On a CPU, or with many rows, the work is simply done first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from outrider.kernels._dispatch import second_lane

MOST_ROWS = 1536
"""Above so many rows a layer's parts fill the device, and run one after the other.

H200, 2026-11-27, a layer of Scout in FP8 beside / one after the other, us: 1,024 rows 1,039 / 1,065, 1,536 1,356 /
1,369, 1,664 1,524 / 1,431, 2,048 1,845 / 1,732, 4,096 3,410 / 3,350, 8,192 7,918 / 7,697; in NVFP4 within 1 %:
trials_h200.txt
"""


Result = TypeVar("Result")


def run_beside(work: Callable[[], Result], x: torch.Tensor) -> Callable[[], Result]:
    """Start ``work`` beside what the caller launches next; the function returned makes the stream wait for its result.

    ``x``: the rows that both take. Call that function before anything that ``work`` reads is freed or written.
    """
    if not x.is_cuda or len(x) > MOST_ROWS:
        result = work()
        return lambda: result
    device = x.device
    main, side = torch.cuda.current_stream(device), _second_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side), second_lane():
        result = work()

    def join() -> Result:
        main.wait_stream(side)
        return result

    return join


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
