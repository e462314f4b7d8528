"""What the kernel benchmarks share: graph timing, error against float64, one table and one JSON file.

Every number is the median over replays of a CUDA graph that runs the op over several input sets, so launch
gaps and warm caches stay out of it. Inputs are random and every op is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton


def parse_args(description: str) -> argparse.Namespace:
    """The options of every kernel benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="default launch constants only, no variants")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    return args


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Microseconds of one call: median over replays of a graph that holds ``calls``, one input set each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """``|out - expected| / |expected|`` in float64; NaN when anything is not finite."""
    wide, exact = out.double(), expected.double()
    return float((wide - exact).norm() / exact.norm())


def copy_bytes_per_s() -> float:
    """What a large device-to-device copy reaches, reads and writes counted.

    Launched one by one: as a node of a graph the same copy ran at 2.7 instead of 4.3 TB/s (H200, 2026-11-23).
    """
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 2 * source.numel() * 10 / (start.elapsed_time(end) / 1e3)


class Report:
    """Rows of one benchmark: printed as they come, written as JSON at the end."""

    def __init__(self, name: str, path: Path | None) -> None:
        self.path = path
        self.copy = copy_bytes_per_s()
        self.rows: list[dict[str, Any]] = []
        props = torch.cuda.get_device_properties(0)
        self.head = {
            "benchmark": name,
            "device": props.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "copy_gb_per_s": round(self.copy / 1e9),
        }
        print(json.dumps(self.head), flush=True)

    def memory(self, case: str, variant: str, us: float, num_bytes: int) -> None:
        """A row of a memory-bound op: GB/s and the share of the copy rate."""
        rate = num_bytes / (us * 1e-6)
        self._add(case, variant, us, gb_per_s=round(rate / 1e9), percent=round(100 * rate / self.copy))

    def compute(self, case: str, variant: str, us: float, flops: float) -> None:
        """A row of a compute-bound op: TFLOP/s."""
        self._add(case, variant, us, tflop_per_s=round(flops / us / 1e6))

    def fail(self, case: str, variant: str, why: str) -> None:
        """A variant that did not run or was wrong."""
        self._add(case, variant, float("nan"), error=why)

    def _add(self, case: str, variant: str, us: float, **numbers: object) -> None:
        row = {"case": case, "variant": variant, "us": round(us, 2), **numbers}
        self.rows.append(row)
        values = " ".join(f"{key}={value}" for key, value in numbers.items())
        print(f"{case:<28} {variant:<34} {us:>10.2f} us  {values}", flush=True)

    def write(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1))
