"""What both processes do when they are ready: say how long it took, settle the heap. Imports nothing heavy.

Called by the engine process and by ``cli/serve.py``, which prints the start-up line of the log.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping

YOUNG_OBJECTS = 50_000
"""A step of 512 sequences keeps some 2,000 new objects alive at once; Python's 700 would collect in every step."""

_IMPORTED_S = time.perf_counter()


def process_age_s() -> float:
    """Seconds since the kernel started this process (Linux), elsewhere since this module was imported."""
    if sys.platform != "linux":
        return time.perf_counter() - _IMPORTED_S
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        started_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def breakdown(stages: Mapping[str, float], total_s: float | None = None) -> str:
    """``imports 3.1 s, weights 0.8 s, …`` and, where ``total_s`` is known, the launch to ready at its end."""
    listed = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
    return listed if total_s is None else f"{listed}; ready {total_s:.1f} s after the launch"


def settle_heap() -> None:
    """Modules, routes and weights are never garbage: no later collection looks at them, or delays a step by it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
