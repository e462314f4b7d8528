"""Two chains of kernels at the same time: one on a second CUDA stream, the other where the caller is.

Called by ``models.moe``, whose shared expert needs nothing of the routed ones: each fills the last, half-empty wave of
the other. Safe in CUDA graphs. On a CPU the work is simply done first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from outrider.kernels._dispatch import second_lane


def run_beside(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Start ``work`` beside what the caller launches next; the function returned makes the stream wait for its result.

    Call that function before anything that ``work`` reads is freed or written.
    """
    if device.type != "cuda":
        result = work()
        return lambda: result
    main, side = torch.cuda.current_stream(device), _second_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side), second_lane():
        result = work()

    def join() -> torch.Tensor:
        main.wait_stream(side)
        return result

    return join


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
