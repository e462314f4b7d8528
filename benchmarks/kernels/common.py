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

from benchmarks.record import about, need_cuda, write


def parse_args(description: str, parts: Sequence[str] = ()) -> argparse.Namespace:
    """The options of every kernel benchmark; ``parts`` can be run alone. ``ConfigError`` without a CUDA device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="default launch constants only, no variants")
    parser.add_argument("--only", choices=parts, help="run this part alone")
    args = parser.parse_args()
    need_cuda("this benchmark")
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
    return 2 * copied_bytes_per_s(torch.empty_like(source), source)


def copied_bytes_per_s(target: torch.Tensor, source: torch.Tensor) -> float:
    """Bytes of ``source`` a second that ten copies to ``target`` on the device reach, counted once."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source, non_blocking=True)
    start.record()
    for _ in range(10):
        target.copy_(source, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return 10 * source.nbytes / (start.elapsed_time(end) / 1e3)


def product_flops_per_s(operand: str) -> float:
    """What cuBLASLt reaches for a product of 8192 x 8192 matrices, with operands ``fp8`` or ``bf16``."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if operand == "fp8":
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")

        def call() -> torch.Tensor:
            return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:

        def call() -> torch.Tensor:
            return a @ b

    return 2 * 8192**3 / (graph_us([call] * 4) * 1e-6)


class Report:
    """Rows of one benchmark: printed as they come, written as JSON at the end.

    Every row has the time and its floor: the bytes at the rate of a copy, or the FLOPs at that of a large product.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.path = path
        self.copy = copy_bytes_per_s()
        self.products = {operand: product_flops_per_s(operand) for operand in ("fp8", "bf16")}
        self.rows: list[dict[str, Any]] = []
        self.head = {
            "benchmark": name,
            **about(f"benchmarks.kernels.{name}"),
            "copy_gb_per_s": round(self.copy / 1e9),
            "product_tflop_per_s": {key: round(value / 1e12) for key, value in self.products.items()},
        }
        print(json.dumps(self.head), flush=True)

    def memory(
        self, case: str, variant: str, us: float, num_bytes: int, bytes_per_s: float | None = None
    ) -> None:
        """A row of a memory-bound op: GB/s, and the share of the copy rate or of ``bytes_per_s``."""
        floor_s = num_bytes / (bytes_per_s or self.copy)
        self._timed(case, variant, us, floor_s, gb_per_s=round(num_bytes / us / 1e3))

    def compute(self, case: str, variant: str, us: float, flops: float, operand: str = "fp8") -> None:
        """A row of a compute-bound op: TFLOP/s, and the share of a large product with operands ``operand``."""
        floor = flops / self.products[operand]
        self._timed(case, variant, us, floor, tflop_per_s=round(flops / us / 1e6))

    def _timed(self, case: str, variant: str, us: float, floor_s: float, **rate: int) -> None:
        floor = floor_s * 1e6
        self._add(case, variant, us, **rate, floor_us=round(floor, 2), percent=round(100 * floor / us))

    def fail(self, case: str, variant: str, why: str) -> None:
        """A variant that did not run or was wrong: a row without a time."""
        self._add(case, variant, None, error=why)

    def _add(self, case: str, variant: str, us: float | None, **numbers: object) -> None:
        rounded = None if us is None else round(us, 2)
        self.rows.append({"case": case, "variant": variant, "us": rounded, **numbers})
        values = " ".join(f"{key}={value}" for key, value in numbers.items())
        shown = "-" if us is None else f"{us:.2f}"
        print(f"{case:<28} {variant:<34} {shown:>10} us  {values}", flush=True)

    def write(self) -> None:
        """Write the JSON file, if one was asked for."""
        write(self.path, {**self.head, "rows": self.rows})
