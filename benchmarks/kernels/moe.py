"""Times the routed-expert kernels at Scout's sizes: ``python -m benchmarks.kernels.moe --json OUT``.

Each of the two grouped products is timed alone over candidate tiles, then the whole op with the table's tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from benchmarks.record import end_with
from outrider.kernels import moe
from outrider.kernels.activation import swiglu
from outrider.kernels.fp8_stream import StreamTile, down_stream, gate_up_stream
from outrider.kernels.moe_dispatch import STATIC_FP8, SortedRows, gather_rows_triton
from outrider.kernels.moe_gemm import Tile, down_triton, gate_up_triton
from outrider.kernels.router import route_rows

EXPERTS, HIDDEN, INTER = 16, 5120, 8192
FP8_PEAK = 1350.0

DECODE_UP = [
    Tile(16, 64, 128, True, 6, 4),
    Tile(16, 64, 256, True, 3, 4),
    Tile(16, 128, 128, True, 4, 8),
    Tile(16, 64, 128, True, 4, 4),
]
DECODE_DOWN = [
    Tile(16, 64, 256, True, 5, 4),
    Tile(16, 64, 128, True, 8, 4),
    Tile(16, 128, 128, True, 6, 8),
]
SPLIT_DOWN = [Tile(16, 64, 256, True, 4, 4, split_k=s) for s in (2, 4, 8)]
WIDE_UP = [Tile(r, 64, 128, True, 4, 4) for r in (32, 64)] + [
    Tile(32, 128, 128, True, 4, 8),
    Tile(64, 128, 128, True, 4, 8),
    Tile(64, 64, 128, True, 4, 4, programs_per_sm=2),
]
WIDE_DOWN = [Tile(r, 64, 256, True, 3, 4) for r in (32, 64)] + [
    Tile(64, 128, 128, True, 5, 4),
    Tile(32, 128, 256, True, 3, 8),
]
PREFILL_UP = [
    Tile(128, 128, 128, False, 4, 8),
    Tile(128, 128, 128, False, 4, 8, programs_per_sm=1),
    Tile(128, 64, 128, False, 4, 4),
    Tile(128, 128, 128, True, 4, 8),
]
PREFILL_DOWN = [
    Tile(128, 128, 128, False, 4, 4),
    Tile(128, 128, 128, False, 3, 8),
    Tile(128, 256, 128, False, 4, 8),
    Tile(128, 256, 128, False, 4, 8, programs_per_sm=1),
]
STREAM_UP = [
    StreamTile(64, 128, 128, 3, 4, 2),
    StreamTile(64, 128, 256, 4),
    StreamTile(128, 128, 256, 4),
    StreamTile(64, 64, 256, 5),
]
STREAM_DOWN = [StreamTile(64, 128, 128, 6), StreamTile(64, 64, 256, 5), StreamTile(64, 64, 128, 8)]
CANDIDATES = {
    1: (DECODE_UP, DECODE_DOWN + SPLIT_DOWN),
    8: (DECODE_UP, DECODE_DOWN + SPLIT_DOWN[:1]),
    64: (DECODE_UP, DECODE_DOWN),
    150: (DECODE_UP[:2] + WIDE_UP[:1], DECODE_DOWN[:2] + WIDE_DOWN[:1]),
    512: (WIDE_UP + STREAM_UP, WIDE_DOWN + STREAM_DOWN),
    752: (STREAM_UP, STREAM_DOWN),
    1024: (WIDE_UP[1:] + PREFILL_UP[3:] + STREAM_UP, WIDE_DOWN[1:] + STREAM_DOWN),
    2048: (PREFILL_UP[:2] + STREAM_UP, PREFILL_DOWN[:2] + STREAM_DOWN),
    8192: (PREFILL_UP, PREFILL_DOWN),
}


class Weights:
    """One layer's experts with random FP8 codes, float32 scales per expert and activation scales."""

    def __init__(self, generator: torch.Generator) -> None:
        def codes(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16).to(
                torch.float8_e4m3fn
            )

        self.w13, self.w2 = codes(EXPERTS, 2 * INTER, HIDDEN), codes(EXPERTS, HIDDEN, INTER)
        self.w13_scale = torch.rand(EXPERTS, device="cuda", generator=generator) * 0.01 + 0.01
        self.w2_scale = torch.rand(EXPERTS, device="cuda", generator=generator) * 0.01 + 0.01
        self.a13_scale = torch.full((), 0.01, device="cuda")
        self.a2_scale = torch.full((), 0.01, device="cuda")

    def op_arguments(self) -> tuple[torch.Tensor, ...]:
        return self.w13, self.w2, self.w13_scale, self.w2_scale, self.a13_scale, self.a2_scale


def label(tile: Tile | StreamTile) -> str:
    """A tile in a few characters: rows x outputs x depth, swapped?, stages, warps, split, persistent."""
    if isinstance(tile, StreamTile):
        return f"{tile.narrow}|{tile.wide}x{tile.weights} st{tile.stages} w{tile.warps} x{tile.programs}"
    name = f"{tile.rows}x{tile.outputs}x{tile.depth}{'s' if tile.swap else ''} st{tile.stages} w{tile.warps}"
    return name + (f" k{tile.split_k}" if tile.split_k > 1 else "") + (" p" if tile.programs_per_sm else "")


def gate_up(rows: SortedRows, weights: Weights, tile: Tile | StreamTile) -> SortedRows:
    """The first product with its SwiGLU, by the kernel of ``tile``."""
    if isinstance(tile, StreamTile):
        return gate_up_stream(rows, weights.w13, weights.w13_scale, weights.a2_scale, torch.bfloat16, tile)
    return gate_up_triton(rows, weights.w13, weights.w13_scale, weights.a2_scale, torch.bfloat16, tile)


def down(hidden: SortedRows, weights: Weights, out: torch.Tensor, tile: Tile | StreamTile) -> None:
    """The second product, by the kernel of ``tile``."""
    run = down_stream if isinstance(tile, StreamTile) else down_triton
    run(hidden, weights.w2, weights.w2_scale, out, tile)  # type: ignore[arg-type]


def check_and_time(
    report: Report,
    case: str,
    variant: str,
    calls: Sequence[Callable[[], object]],
    error_of: Callable[[object], float],
    limit: float,
    num_bytes: int,
    flops: float,
) -> None:
    """One row: bytes for what streams weights, FLOPs otherwise; a wrong or unlaunchable variant is a failure."""
    try:
        error = error_of(calls[0]())
        if not error <= limit:
            report.fail(case, variant, f"relative error {error:.2e} > {limit}")
        us = graph_us(calls, 11)
    except Exception as error_here:  # one candidate that does not fit must not end the run
        report.fail(case, variant, str(error_here).splitlines()[0][:120])
        return
    if flops / FP8_PEAK > num_bytes / report.copy * 1e12:
        report.compute(case, variant, us, flops)
    else:
        report.memory(case, variant, us, num_bytes)


def bench_size(report: Report, sets: list[Weights], num_tokens: int, quick: bool) -> None:
    """All candidates at one batch size."""
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(num_tokens, EXPERTS, device="cuda", dtype=torch.bfloat16)
    expert_ids, scores = moe.route_reference(logits, 1)
    active = int(expert_ids.unique().numel())
    first = sets[0]
    rows = gather_rows_triton(x, expert_ids, scores, (0, EXPERTS), STATIC_FP8, first.a13_scale)
    bytes13, bytes2 = active * 2 * INTER * HIDDEN, active * INTER * HIDDEN
    flops = 2.0 * num_tokens * INTER * HIDDEN
    if not quick:
        expected = reference_hidden(rows, first, expert_ids)
        for tile in CANDIDATES[num_tokens][0]:
            calls = [lambda w=w, t=tile: gate_up(rows, w, t) for w in sets]
            check_and_time(
                report,
                f"moe fp8 gate_up T={num_tokens}",
                label(tile),
                calls,
                lambda out: relative_error(out.x[:num_tokens], expected),
                0.05,
                bytes13,
                2 * flops,
            )
        hidden = SortedRows(
            torch.cat((expected, expected[:1].expand(256, -1))),
            rows.index,
            rows.offsets,
            first.a2_scale,
            num_tokens,
        )
        out = torch.empty(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        out_expected = reference_down(hidden, first, expert_ids)
        for tile in CANDIDATES[num_tokens][1]:
            calls = [lambda w=w, t=tile: down(hidden, w, out, t) for w in sets]
            out.fill_(float("nan"))
            check_and_time(
                report,
                f"moe fp8 down T={num_tokens}",
                label(tile),
                calls,
                lambda _: relative_error(out, out_expected),
                0.02,
                bytes2,
                flops,
            )
    expected = moe.moe_fp8_reference(x, expert_ids, scores, *first.op_arguments())
    calls = [lambda w=w: moe.moe_fp8(x, expert_ids, scores, *w.op_arguments()) for w in sets]
    whole = f"moe fp8 whole T={num_tokens}"
    check_and_time(
        report,
        whole,
        "table",
        calls,
        lambda y: relative_error(y, expected),
        0.05,
        bytes13 + bytes2,
        3 * flops,
    )
    router = torch.randn(EXPERTS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    report.memory(
        f"moe route T={num_tokens}",
        "",
        graph_us([lambda: route_rows(x, router, 1)] * 8),
        x.nbytes + router.nbytes,
    )
    gather = graph_us(
        [lambda: gather_rows_triton(x, expert_ids, scores, (0, EXPERTS), STATIC_FP8, first.a13_scale)] * 8
    )
    report.memory(f"moe gather T={num_tokens}", "", gather, 3 * x.numel())


def reference_hidden(rows: SortedRows, weights: Weights, expert_ids: torch.Tensor) -> torch.Tensor:
    """The grouped rows' quantised SwiGLU, product by product in float32."""
    experts = expert_ids.flatten()[rows.index.long()]
    out = torch.empty(rows.num_rows, INTER, dtype=torch.float8_e4m3fn, device="cuda")
    for expert in experts.unique().tolist():
        mine = experts == expert
        codes = rows.x[: rows.num_rows][mine].float()
        gate_up = codes @ weights.w13[expert].float().T * (weights.a13_scale * weights.w13_scale[expert])
        out[mine] = moe.quantize_fp8_reference(swiglu(gate_up.to(torch.bfloat16)), weights.a2_scale)
    return out


def reference_down(hidden: SortedRows, weights: Weights, expert_ids: torch.Tensor) -> torch.Tensor:
    """The second product in float32, back in token order."""
    experts = expert_ids.flatten()[hidden.index.long()]
    out = torch.empty(hidden.num_rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    for expert in experts.unique().tolist():
        mine = experts == expert
        codes = hidden.x[: hidden.num_rows][mine].float()
        product = codes @ weights.w2[expert].float().T * (weights.a2_scale * weights.w2_scale[expert])
        out[hidden.index[mine].long()] = product.to(torch.bfloat16)
    return out


def main() -> None:
    """Every size, every candidate."""
    args = parse_args("Times the routed-expert kernels at Scout's sizes.")
    report = Report("moe", args.json)
    generator = torch.Generator("cuda").manual_seed(1)
    sets = [Weights(generator) for _ in range(3)]
    for num_tokens in CANDIDATES:
        bench_size(report, sets, num_tokens, args.quick)
    report.write()


if __name__ == "__main__":
    end_with(main)
