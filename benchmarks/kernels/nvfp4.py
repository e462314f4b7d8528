"""Times the NVFP4 products at Scout's sizes: ``python -m benchmarks.kernels.nvfp4 --json OUT``.

Prints first how far each arithmetic is from exact weights and activations (relative error of one product on
Gaussian data), then checks every candidate against exact weights before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from benchmarks.record import end_with
from outrider.kernels import moe, moe_nvfp4, nvfp4
from outrider.kernels.moe_dispatch import STREAM_FP8, SortedRows, gather_rows_triton
from outrider.kernels.nvfp4_repack import quantize_stream, repack_nvfp4_
from outrider.kernels.nvfp4_stream import StreamTile, stream_triton

EXPERTS, HIDDEN, INTER = 16, 5120, 8192
FP8_PEAK = 1350.0
DENSE = {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (16384, 5120), "down": (5120, 8192)}
Pair = tuple[StreamTile, StreamTile]


def _pair(*constants: int) -> Pair:
    return StreamTile(*constants), StreamTile(*constants)


TILE_16, TILE_32, TILE_64, TILE_128 = (
    _pair(16, 16, 4, 4, 4),
    _pair(16, 32, 8, 4, 2),
    _pair(32, 64, 8, 3, 2),
    _pair(64, 128, 8, 4, 1),
)
CANDIDATES: dict[int, list[Pair]] = {
    1: [(StreamTile(16, 16, 4, 3, 4), StreamTile(16, 16, 4, 3, 4, split_k=k)) for k in (4, 2)],
    64: [TILE_16],
    256: [TILE_16, TILE_32],
    448: [TILE_32, TILE_64],
    512: [TILE_32, TILE_64],
    912: [TILE_64, TILE_128],
    1024: [TILE_64, TILE_128],
    2048: [TILE_64, TILE_128],
    4096: [TILE_128],
    8192: [],
}
MORE: dict[int, list[Pair]] = {
    64: [_pair(16, 16, 4, 3, 4), _pair(16, 16, 4, 7, 2)],
    256: [_pair(16, 32, 4, 3, 4), _pair(16, 32, 4, 6, 2), _pair(32, 32, 8, 4, 2)],
    512: [_pair(64, 64, 8, 3, 2), _pair(16, 64, 8, 3, 2), _pair(32, 64, 4, 3, 3)],
    1024: [_pair(16, 64, 8, 3, 2), _pair(32, 128, 8, 4, 1), _pair(128, 128, 8, 4, 1)],
    8192: [TILE_128],
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


def label(tile: StreamTile) -> str:
    """A tile in a few characters."""
    name = f"{tile.narrow}, {tile.wide} rows w{tile.warps} st{tile.stages} x{tile.programs}"
    return name + (f" k{tile.split_k}" if tile.split_k > 1 else "")


def timed(
    report: Report,
    case: str,
    variant: str,
    calls: Sequence[Callable[[], torch.Tensor]],
    expected: torch.Tensor | None,
    limit: float,
    num_bytes: float,
    flops: float,
) -> None:
    """One row, memory- or compute-bound by its own counts; wrong or unlaunchable variants are failures."""
    try:
        error = 0.0 if expected is None else relative_error(calls[0](), expected)
        if not error <= limit:
            report.fail(case, variant, f"relative error {error:.2e} > {limit}")
        us = graph_us(calls, 9)
    except Exception as error_here:  # one candidate that does not fit must not end the run
        report.fail(case, variant, " ".join(str(error_here).split())[:200])
        return
    if flops / FP8_PEAK > num_bytes / report.copy * 1e12:
        report.compute(case, variant, us, flops)
    else:
        report.memory(case, variant, us, int(num_bytes))


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
        "weight-only": nvfp4.nvfp4_linear(x, *weights),
        "fp8 rows": nvfp4.fp8_rows_linear(x, *nvfp4.nvfp4_to_fp8_rows(*weights), x.dtype),
        "w4a4 (format's own)": x4.flatten(-2).double() @ quantised.T,
    }
    for name, out in outs.items():
        print(
            f"accuracy {name:<20} from exact arithmetic {relative_error(out, exact):.4f},"
            f" from unquantised weights {relative_error(out, original):.4f}"
        )


def bench_dense(report: Report, name: str) -> None:
    """One dense shape, decoded once to FP8 rows, over row counts; for few rows beside it four bits, streamed."""
    num_outputs, depth = DENSE[name]
    sets = [gaussian_weights(num_outputs, depth) for _ in range(4)]
    rows_sets = [nvfp4.nvfp4_to_fp8_rows(*weights) for weights in sets]
    exact = nvfp4.dequantize_nvfp4(*sets[0], torch.float32)
    for rows in (1, 64, 512, 1024):
        x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
        case, flops = f"nvfp4 {name} T={rows}", 2.0 * rows * num_outputs * depth
        calls = [lambda w=w, x=x: nvfp4.fp8_rows_linear(x, *w, x.dtype) for w in rows_sets]
        timed(report, case, "fp8 rows", calls, x.float() @ exact.T, 0.05, exact.numel(), flops)
    repacked = [(packed[None].clone(), scale[None].clone(), top) for packed, scale, top in sets]
    for packed, scale, _ in repacked:
        repack_nvfp4_(packed, scale, gated=False)
    for rows in (1, 16):
        x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
        case, flops = f"nvfp4 {name} T={rows}", 2.0 * rows * num_outputs * depth
        index = torch.arange(rows, dtype=torch.int32, device="cuda")
        one_group = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
        for split_k in (1, 2, 4):
            fixed = (x, index, one_group)
            tile = StreamTile(16, 16, 4, 3, 4, split_k)
            calls = [lambda w=w, fixed=fixed, tile=tile: stream_dense(*fixed, w, tile) for w in repacked]
            timed(report, case, label(tile), calls, x.float() @ exact.T, 0.06, exact.numel() * 9 / 16, flops)


def stream_dense(
    x: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, weights: Weights, tile: StreamTile
) -> torch.Tensor:
    """``x @ W.T`` for few rows: the streamed product with one expert that takes every row."""
    codes, scale = quantize_stream(x)
    out = torch.empty((len(x), weights[0].shape[1]), dtype=x.dtype, device=x.device)
    stream_triton(SortedRows(codes, index, offsets, scale, len(x)), *weights, out=out, tile=tile, gated=False)
    return out


class Experts:
    """One layer's experts in both orders, and the exact weights' results for one batch at a time."""

    def __init__(self) -> None:
        self.up = gaussian_weights(EXPERTS, 2 * INTER, HIDDEN)
        self.down = gaussian_weights(EXPERTS, HIDDEN, INTER)
        self.repacked_up = (self.up[0].clone(), self.up[1].clone(), self.up[2])
        self.repacked_down = (self.down[0].clone(), self.down[1].clone(), self.down[2])
        repack_nvfp4_(*self.repacked_up[:2], gated=True)
        repack_nvfp4_(*self.repacked_down[:2], gated=False)


def bench_moe(report: Report, sets: list[Experts], num_tokens: int, pairs: list[Pair]) -> None:
    """Each product alone for every candidate, then the whole op as the table runs it."""
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids, scores = moe.route_reference(
        torch.randn(num_tokens, EXPERTS, device="cuda", dtype=torch.bfloat16), 1
    )
    expected = moe.moe_nvfp4_reference(x, ids, scores, *sets[0].up, *sets[0].down)
    active = int(ids.unique().numel())
    up_bytes, flops = active * 2 * INTER * HIDDEN * 9 / 16, 4.0 * num_tokens * INTER * HIDDEN
    rows = gather_rows_triton(x, ids, scores, (0, EXPERTS), STREAM_FP8)
    hidden = torch.randn(num_tokens, INTER, device="cuda", dtype=torch.bfloat16)
    down_rows = SortedRows(*_stream_rows(hidden, rows), num_tokens)
    out = torch.empty_like(x)

    def op(weights: Experts, tiles: Pair | None) -> torch.Tensor:
        return moe_nvfp4.moe_nvfp4_repacked(
            x, ids, scores, *weights.repacked_up, *weights.repacked_down, None, tiles
        )

    def up(weights: Experts, tile: StreamTile) -> torch.Tensor:
        stream_triton(rows, *weights.repacked_up, hidden, tile, gated=True)
        return hidden

    def down(weights: Experts, tile: StreamTile) -> torch.Tensor:
        stream_triton(down_rows, *weights.repacked_down, out, tile, gated=False)
        return out

    case = f"moe nvfp4 T={num_tokens}"
    for pair in pairs:
        name = label(pair[0]) if pair[0] == pair[1] else f"{label(pair[0])} / {label(pair[1])}"
        calls = [lambda w=w, pair=pair: op(w, pair) for w in sets]
        timed(report, case, name, calls, expected, 0.09, 1.5 * up_bytes, 1.5 * flops)
        calls = [lambda w=w, pair=pair: up(w, pair[0]) for w in sets]
        timed(report, f"{case} up", label(pair[0]), calls, None, 0.0, up_bytes, flops)
        calls = [lambda w=w, pair=pair: down(w, pair[1]) for w in sets]
        timed(report, f"{case} down", label(pair[1]), calls, None, 0.0, up_bytes / 2, flops / 2)
    calls = [lambda w=w: op(w, None) for w in sets]
    timed(report, case, "table", calls, expected, 0.09, 1.5 * up_bytes, 1.5 * flops)


def _stream_rows(hidden: torch.Tensor, rows: SortedRows) -> tuple[torch.Tensor, ...]:
    codes, scale = quantize_stream(hidden)
    return codes, rows.index, rows.offsets, scale


def bench_helpers(report: Report) -> None:
    """Turning activations into e4m3 in stream order."""
    x = torch.randn(512, INTER, device="cuda", dtype=torch.bfloat16)
    timed(
        report, "quantize stream T=512", "", [lambda: quantize_stream(x)[0]] * 8, None, 0.0, 3 * x.numel(), 0
    )


def main() -> None:
    """Accuracy, then every shape and candidate."""
    args = parse_args("Times the NVFP4 products at Scout's sizes.")
    report = Report("nvfp4", args.json)
    accuracy()
    sets = [Experts() for _ in range(3)]
    bench_helpers(report)
    for num_tokens, pairs in CANDIDATES.items():
        bench_moe(report, sets, num_tokens, pairs + ([] if args.quick else MORE.get(num_tokens, [])))
    for name in DENSE:
        bench_dense(report, name)
    report.write()


if __name__ == "__main__":
    end_with(main)
