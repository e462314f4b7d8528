"""Times the NVFP4 products at Scout's sizes: ``python -m benchmarks.kernels.nvfp4 --json OUT``.

Prints first how far each arithmetic is from exact weights and activations (relative error of one product on
Gaussian data): weight-only, FP8 activations, and the format's own 4-bit activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from outrider.kernels import moe, nvfp4
from outrider.kernels.nvfp4_gemm import (
    Nvfp4Tile,
    dequantize_nvfp4_triton,
    nvfp4_to_fp8_triton,
    to_planes_triton,
)

EXPERTS, HIDDEN, INTER = 16, 5120, 8192
DENSE = {"qkv": (7168, 5120), "o": (5120, 5120), "down": (5120, 8192)}
DENSE_TILES = {
    False: [Nvfp4Tile(16, 64, 16, 4, 4, 4), Nvfp4Tile(16, 128, 16, 3, 8, 4)],
    True: [Nvfp4Tile(16, 64, 32, 3, 4, 4), Nvfp4Tile(16, 128, 32, 2, 8, 4)],
}
MOE_TILES = {
    1: [Nvfp4Tile(16, 64, 16, 4, 4), Nvfp4Tile(16, 64, 32, 3, 4)],
    64: [Nvfp4Tile(16, 64, 16, 4, 4), Nvfp4Tile(16, 64, 32, 3, 4), Nvfp4Tile(16, 128, 32, 2, 8)],
    512: [Nvfp4Tile(32, 64, 16, 4, 4), Nvfp4Tile(32, 64, 32, 3, 4), Nvfp4Tile(64, 128, 32, 2, 8)],
}

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gaussian_weights(*shape: int) -> Weights:
    """Gaussian values quantised as ModelOpt does: (packed, block scale, global scale)."""
    parts = [
        gaussian_part(torch.randn(shape[-2:], device="cuda")) for _ in range(shape[0] if shape[2:] else 1)
    ]
    packed, scale = torch.stack([p for p, _ in parts]), torch.stack([s for _, s in parts])
    if not shape[2:]:
        packed, scale = packed[0], scale[0]
    return packed, scale, torch.tensor(6.0 / 2688.0, device="cuda")


def gaussian_part(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix; the global scale is that of a largest value of 6 standard deviations."""
    rounded, scale = nvfp4.quantize_nvfp4_activations(values, torch.tensor(6.0 / 2688.0, device="cuda"))
    magnitudes = torch.tensor(nvfp4.E2M1_VALUES[:8], device="cuda")
    codes = torch.bucketize(rounded.abs(), magnitudes).to(torch.uint8) | (rounded < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale


def label(tile: Nvfp4Tile, fp8: bool) -> str:
    """A tile in a few characters."""
    name = f"{'w4a8' if fp8 else 'w4a16'} {tile.rows}x{tile.outputs}x{tile.blocks * 16} st{tile.stages} w{tile.warps}"
    return name + (f" k{tile.split_k}" if tile.split_k > 1 else "")


def timed(
    report: Report,
    case: str,
    variant: str,
    calls: Sequence[Callable[[], torch.Tensor]],
    expected: torch.Tensor | None,
    limit: float,
    num_bytes: int,
    flops: float,
) -> None:
    """One row, memory- or compute-bound by its own counts; wrong or unlaunchable variants are failures."""
    try:
        error = 0.0 if expected is None else relative_error(calls[0](), expected)
        if not error <= limit:
            report.fail(case, variant, f"relative error {error:.2e} > {limit}")
        us = graph_us(calls, 9)
    except Exception as error_here:  # one candidate that does not fit must not end the run
        report.fail(case, variant, str(error_here).splitlines()[0][:120])
        return
    if flops / 700 > num_bytes / report.copy * 1e12:
        report.compute(case, variant, us, flops)
    else:
        report.memory(case, variant, us, num_bytes)


def accuracy() -> None:
    """Relative RMS of x · Wᵀ against float64 on the same quantised weights, and on the weights before them."""
    values = torch.randn(4096, HIDDEN, device="cuda")
    packed, scale = gaussian_part(values)
    weights = (packed, scale, torch.tensor(6.0 / 2688.0, device="cuda"))
    x = torch.randn(256, HIDDEN, device="cuda", dtype=torch.bfloat16)
    quantised = nvfp4.dequantize_nvfp4(*weights, torch.float32).double()
    exact, original = x.double() @ quantised.T, x.double() @ values.double().T
    x4, x_scale = nvfp4.quantize_nvfp4_activations(x, x.float().abs().max() / 2688)
    x4 = x4.unflatten(-1, (-1, 16)) * (x_scale.float() * (x.float().abs().max() / 2688))[..., None]
    outs = {
        "w4a16 in kernel": nvfp4.nvfp4_linear_triton(x, *weights, False, Nvfp4Tile(64, 64, 16, 3, 4)),
        "w4a8 in kernel": nvfp4.nvfp4_linear_triton(x, *weights, True, Nvfp4Tile(64, 64, 32, 3, 4)),
        "w4a8 decoded": nvfp4.nvfp4_linear_triton(x, *weights, True),
        "w4a4 (format's own)": x4.flatten(-2).double() @ quantised.T,
    }
    for name, out in outs.items():
        print(
            f"accuracy {name:<20} from exact arithmetic {relative_error(out, exact):.4f},"
            f" from unquantised weights {relative_error(out, original):.4f}"
        )


def bench_dense(report: Report, name: str, rows: int, quick: bool) -> None:
    """One dense shape at one row count, both activation types."""
    num_outputs, depth = DENSE[name]
    sets = [gaussian_weights(num_outputs, depth) for _ in range(8)]
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ nvfp4.dequantize_nvfp4(*sets[0], torch.float32).T
    num_bytes = sets[0][0].nbytes + sets[0][1].nbytes
    for fp8 in (False, True):
        tiles: list[Nvfp4Tile | None] = [None]
        if rows <= 16 and not quick:
            tiles += DENSE_TILES[fp8]
        for tile in tiles:

            def run(weights: Weights, tile: Nvfp4Tile | None = tile, fp8: bool = fp8) -> torch.Tensor:
                return nvfp4.nvfp4_linear_triton(x, *weights, fp8, tile)

            variant = label(tile, fp8) if tile else ("w4a8 table" if fp8 else "w4a16 table")
            calls = [lambda w=w, run=run: run(w) for w in sets]
            flops = 2.0 * rows * num_outputs * depth
            timed(
                report,
                f"nvfp4 {name} T={rows}",
                variant,
                calls,
                expected,
                0.06 if fp8 else 6e-3,
                num_bytes,
                flops,
            )


def bench_moe(report: Report, sets: list[tuple[Weights, Weights]], rows: int, quick: bool) -> None:
    """The routed experts at one batch size, both activation types."""
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids, scores = moe.route(torch.randn(rows, EXPERTS, device="cuda", dtype=torch.bfloat16), 1)
    expected = moe.moe_nvfp4_reference(x, ids, scores, *sets[0][0], *sets[0][1])
    active = int(ids.unique().numel())
    num_bytes = active * 3 * INTER * HIDDEN * 9 // 16
    for fp8 in (False, True):
        tiles: list[Nvfp4Tile | None] = [None]
        if not quick:
            tiles += [tile for tile in MOE_TILES.get(rows, ()) if tile.blocks == 32 or not fp8]
        for tile in tiles:

            def run(
                up: Weights, down: Weights, tile: Nvfp4Tile | None = tile, fp8: bool = fp8
            ) -> torch.Tensor:
                return moe.moe_nvfp4_triton(x, ids, scores, *up, *down, None, fp8, tile)

            variant = label(tile, fp8) if tile else ("w4a8 table" if fp8 else "w4a16 table")
            calls = [lambda u=u, d=d, run=run: run(u, d) for u, d in sets]
            flops = 6.0 * rows * INTER * HIDDEN
            timed(
                report,
                f"moe nvfp4 T={rows}",
                variant,
                calls,
                expected,
                0.09 if fp8 else 1e-2,
                num_bytes,
                flops,
            )


def bench_helpers(report: Report, weights: Weights) -> None:
    """Decoding one layer's gate and up weights to memory, and turning activations into planes."""
    num_values = 2 * weights[0].numel()
    case = "nvfp4 decode w13"
    timed(report, case, "fp8", [lambda: nvfp4_to_fp8_triton(*weights[:2])], None, 0, num_values * 25 // 16, 0)
    x = torch.randn(512, HIDDEN, device="cuda", dtype=torch.bfloat16)
    timed(
        report,
        "to planes T=512",
        "fp8",
        [lambda: to_planes_triton(x, 512, 32, True).x] * 8,
        None,
        0,
        3 * x.numel(),
        0,
    )
    one = weights[0][0], weights[1][0], weights[2]
    timed(
        report,
        "nvfp4 decode expert",
        "bf16",
        [lambda: dequantize_nvfp4_triton(*one, torch.bfloat16)],
        None,
        0,
        one[0].numel() * 2 * 41 // 16,
        0,
    )


def main() -> None:
    """Accuracy, then every shape and candidate."""
    args = parse_args("Times the NVFP4 products at Scout's sizes.")
    report = Report("nvfp4", args.json)
    accuracy()
    sets = [
        (gaussian_weights(EXPERTS, 2 * INTER, HIDDEN), gaussian_weights(EXPERTS, HIDDEN, INTER))
        for _ in range(4)
    ]
    bench_helpers(report, sets[0][0])
    for rows in (1, 64, 512, 8192):
        bench_moe(report, sets, rows, args.quick)
    for name in DENSE:
        for rows in (1, 64, 512, 8192):
            bench_dense(report, name, rows, args.quick)
    report.write()


if __name__ == "__main__":
    main()
