"""How long a start takes: seconds since this process began, and the stages up to "ready". Imports nothing heavy.

Read by the engine process (how long its imports took) and by ``cli/serve.py`` (the start-up line of the log).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

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
