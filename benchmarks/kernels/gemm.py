"""Times the dense products at Scout's sizes: ``python -m benchmarks.kernels.gemm --json OUT``.

Few rows: candidate tiles of the Triton kernel against cuBLASLt, memory-bound. Many rows: cuBLASLt alone, with a
scale a row and column (what the model uses) and with one scale a tensor (what that costs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from benchmarks.record import end_with
from outrider.kernels import gemm
from outrider.kernels.gemm import SkinnyTile
from outrider.kernels.quantize import quantize_fp8, quantize_fp8_rowwise

SHAPES = {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (16384, 5120), "down": (5120, 8192)}
FP8_TILES = [
    SkinnyTile(64, 256, 4, 4, 2),
    SkinnyTile(64, 128, 6, 4, 3),
    SkinnyTile(128, 128, 5, 4, 2),
    SkinnyTile(64, 256, 5, 4, 4),
]
BF16_TILES = [SkinnyTile(64, 128, 5, 4, 2), SkinnyTile(128, 64, 5, 4, 2), SkinnyTile(64, 128, 4, 4, 3)]
SKINNY_ROWS = (1, 8, 64, 150)
WIDE_ROWS = (64, 150, 512, 1024, 8192)
SETS = 4


def codes(*shape: int) -> torch.Tensor:
    """Random e4m3 codes."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def label(tile: SkinnyTile) -> str:
    """A tile in a few characters."""
    return f"{tile.outputs}x{tile.depth} st{tile.stages} w{tile.warps} p{tile.programs_per_sm}"


def bench_fp8(report: Report, name: str, rows: int, quick: bool) -> None:
    """One FP8 shape at one row count."""
    num_outputs, depth = SHAPES[name]
    weights = [codes(num_outputs, depth) for _ in range(SETS)]
    w_scale = torch.rand(num_outputs, device="cuda") * 0.01 + 0.01
    x_scale = torch.full((), 0.02, device="cuda")
    x = codes(rows, depth)
    one = torch.ones((), device="cuda")
    expected = gemm.fp8_linear_reference(x, weights[0], x_scale, w_scale, torch.bfloat16)

    def rowwise(w: torch.Tensor) -> torch.Tensor:
        return gemm.fp8_linear_cublas(x, w, x_scale, w_scale, torch.bfloat16)

    def tensorwise(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def skinny(tile: SkinnyTile) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda w: gemm.skinny_triton(x, w, x_scale, w_scale, torch.bfloat16, tile)

    variants = {"cublas rowwise": rowwise} if rows in WIDE_ROWS else {}
    if rows in (1024, 8192):
        variants["cublas tensorwise"] = tensorwise
    if rows in SKINNY_ROWS:
        variants |= {label(tile): skinny(tile) for tile in (FP8_TILES[:1] if quick else FP8_TILES)}
    for variant, run in variants.items():
        time_variant(report, f"fp8 {name} T={rows}", variant, run, weights, x, expected)


def time_variant(report, case, variant, run, weights, x, expected) -> None:
    """Check one variant, then time it over all weight sets."""
    try:
        error = relative_error(run(weights[0]), expected)
        if not error < 0.02 and variant != "cublas tensorwise":
            report.fail(case, variant, f"relative error {error:.2e}")
        us = graph_us([lambda w=w: run(w) for w in weights])
    except Exception as error_here:  # one candidate that does not fit must not end the run
        report.fail(case, variant, str(error_here).splitlines()[0][:120])
        return
    flops = 2.0 * x.shape[0] * weights[0].numel()
    if x.shape[0] > 256:
        operand = "fp8" if x.element_size() == 1 else "bf16"
        report.compute(case, variant, us, flops, operand)
    else:
        report.memory(case, variant, us, weights[0].nbytes + x.nbytes + expected.nbytes)


def bench_bf16(report: Report, name: str, num_outputs: int, rows: int) -> None:
    """lm_head or the router at one row count: cuBLAS against the Triton kernel."""
    weights = [torch.randn(num_outputs, 5120, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(rows, 5120, device="cuda", dtype=torch.bfloat16)
    expected = F.linear(x, weights[0])
    case = f"bf16 {name} T={rows}"
    time_variant(report, case, "cublas", lambda w: F.linear(x, w), weights, x, expected)
    for tile in BF16_TILES if rows <= 64 else ():

        def skinny(w: torch.Tensor, tile: SkinnyTile = tile) -> torch.Tensor:
            return gemm.skinny_triton(x, w, None, None, torch.bfloat16, tile)

        time_variant(report, case, label(tile), skinny, weights, x, expected)


def bench_quantize(report: Report, rows: int) -> None:
    """The two activation quantisers."""
    scale = torch.full((), 0.02, device="cuda")
    x = torch.randn(rows, 5120, device="cuda", dtype=torch.bfloat16)
    us = graph_us([lambda: quantize_fp8(x, scale)] * 8)
    report.memory(f"quantize T={rows}", "static", us, 3 * x.numel())
    us = graph_us([lambda: quantize_fp8_rowwise(x)] * 8)
    report.memory(f"quantize T={rows}", "rowwise", us, 3 * x.numel())


def main() -> None:
    """Every shape, every candidate."""
    args = parse_args("Times the dense products at Scout's sizes.")
    report = Report("gemm", args.json)
    for name in SHAPES:
        for rows in sorted({*SKINNY_ROWS, *WIDE_ROWS}):
            bench_fp8(report, name, rows, args.quick)
    for rows in (1, 64, 512):
        bench_bf16(report, "lm_head", 202048, rows)
        bench_bf16(report, "router", 16, rows)
    for rows in (1, 512, 8192):
        bench_quantize(report, rows)
    report.write()


if __name__ == "__main__":
    end_with(main)
