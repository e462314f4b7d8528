"""Mixture of experts, the routed part: choose experts, scale the input by the score, run SwiGLU per expert.

Called by the MoE layer of ``models`` through ``quant``. The shared expert is the model's business.
Llama 4: the router's sigmoid score multiplies the expert's *input*, rounded to the model dtype (and, in FP8,
before quantising), because SiLU makes scaling the output a different function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from outrider.kernels._dispatch import on_gpu
from outrider.kernels.activation import swiglu
from outrider.kernels.fp8_stream import StreamTile, can_stream, down_stream, gate_up_stream
from outrider.kernels.invariant import is_invariant
from outrider.kernels.moe_dispatch import (
    PLAIN,
    STATIC_FP8,
    SortedRows,
    gather_rows_triton,
)
from outrider.kernels.moe_gemm import Tile, down_triton, gate_up_triton
from outrider.kernels.nvfp4 import dequantize_nvfp4
from outrider.kernels.nvfp4_decode import dequantize_nvfp4_triton
from outrider.kernels.quantize import quantize_fp8_reference

TileT = TypeVar("TileT")
ExpertMlp = Callable[[torch.Tensor, int], torch.Tensor]
"""(rows [R, M] already scaled, local expert) -> [R, M]."""

FP8_TILES = (
    (1, Tile(16, 64, 128, True, 6, 4), Tile(16, 64, 256, True, 5, 4, split_k=4)),
    (12, Tile(16, 64, 128, True, 6, 4), Tile(16, 64, 256, True, 5, 4)),
    (24, Tile(32, 64, 128, True, 5, 4), Tile(32, 64, 256, True, 4, 4)),
    (44, Tile(64, 64, 128, True, 5, 4), Tile(64, 128, 128, True, 5, 4)),
    (80, Tile(128, 128, 128, True, 4, 8), Tile(64, 128, 128, True, 5, 4)),
    (1 << 30, Tile(128, 128, 128, False, 4, 8, programs_per_sm=1), Tile(128, 128, 128, False, 5, 8)),
)
"""(most rows an expert on average, gate-up tile, down tile) for e4m3.

H200, 2026-11-23, 16 experts of 5120 x 8192: gate-up 301 us at 64 tokens (depth 256: 297), 316 at 512 (in 4
stages), 356 at 1,024 (64 x 64 tiles: 377, for half of the experts then have a second row block), 1,174 at 8,192 (a
program a tile: 1,165): benchmarks/results/kernels_moe_h200.json
"""

HOPPER_FP8_TILES: tuple[tuple[int, Tile | StreamTile, Tile | StreamTile], ...] = (
    *(row for row in FP8_TILES if row[0] <= 24),
    (66, StreamTile(64, 128, 256, 4), StreamTile(64, 128, 128, 6)),
    (100, StreamTile(64, 128, 128, 3, 4, 2), StreamTile(64, 128, 128, 6)),
    (160, StreamTile(64, 64, 256, 5), StreamTile(64, 64, 256, 5)),
    (288, FP8_TILES[-1][1], StreamTile(64, 64, 256, 5)),
    FP8_TILES[-1],
)
"""The same for experts that ``can_stream``.

H200, 2026-11-26, both products of a layer with random routing in us, by FP8_TILES / by these: 512 tokens 556 / 505, 752
573 / 507, 1,024 591 / 530, 1,280 678 / 560, 1,536 596 / 566, 2,048 753 / 717, 4,096 1,191 / 1,126; under a lasting load
752 603 / 517, 1,024 645 / 564. Up to 384 tokens nothing is gained: trials_h200.txt
"""

BF16_TILES = (
    (1, Tile(16, 64, 64, True, 5, 4), Tile(16, 64, 128, True, 5, 4, split_k=4)),
    (12, Tile(16, 64, 64, True, 5, 4), Tile(16, 64, 128, True, 5, 4)),
    (80, Tile(64, 64, 64, True, 5, 4), Tile(64, 128, 64, True, 4, 4)),
    (1 << 30, Tile(128, 128, 64, False, 4, 8), Tile(128, 128, 64, False, 4, 8)),
)
"""The same for bf16 weights. Not tuned and not timed: in bf16 Scout's experts, 193 GB, are more than an H200 holds."""

INVARIANT_ROWS = 40
"""Rows an expert whose tiles ``--deterministic`` takes for any number: they do not split the depth.

Not tuned; what the mode costs stands at ``gemm.INVARIANT_TILES``.
"""


def moe_bf16(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Routed experts with unquantised weights: ``x[T, M] -> [T, M]``.

    ``w13`` [E, 2I, M] (gate rows first), ``w2`` [E, M, I]. ``expert_range`` = (first, count) names the experts
    held here; the others contribute zero.
    """
    if not on_gpu(x):
        return moe_bf16_reference(x, expert_ids, scores, w13, w2, expert_range)
    return moe_bf16_triton(x, expert_ids, scores, w13, w2, expert_range)


def moe_fp8(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor,
    a2_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Routed experts in static FP8: as ``moe_bf16`` with e4m3 weights.

    ``w13_scale``, ``w2_scale`` f32 [E]; ``a13_scale``, ``a2_scale`` f32 of one element, the calibrated scales of
    the score-scaled input and of silu(gate)·up.
    """
    arguments = (x, expert_ids, scores, w13, w2, w13_scale, w2_scale, a13_scale, a2_scale, expert_range)
    if not on_gpu(x):
        return moe_fp8_reference(*arguments)
    return moe_fp8_triton(*arguments)


def moe_nvfp4(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w13_block_scale: torch.Tensor,
    w13_global_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_block_scale: torch.Tensor,
    w2_global_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Routed experts with NVFP4 weights: as ``moe_bf16`` on the dequantised weights.

    ``w13`` u8 [E, 2I, M/2], block scales e4m3 [E, 2I, M/16], global scale f32 of one element; ``w2`` likewise
    [E, M, I/2]. On a GPU every call decodes all experts to memory: for shapes that no other path takes.
    """
    op = moe_nvfp4_triton if on_gpu(x) else moe_nvfp4_reference
    return op(
        x, expert_ids, scores, w13, w13_block_scale, w13_global_scale,
        w2, w2_block_scale, w2_global_scale, expert_range,
    )  # fmt: skip


def moe_bf16_triton(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """``moe_bf16`` as three Triton launches; ``tiles`` overrides the table."""
    experts = expert_range or (0, w13.shape[0])
    up_tile, down_tile = tiles or choose_tiles(BF16_TILES, expert_ids.numel(), experts[1])
    rows = gather_rows_triton(x, expert_ids, scores, experts, PLAIN)
    hidden = gate_up_triton(rows, w13, None, None, x.dtype, up_tile)
    return _down(hidden, w2, None, down_tile, x, expert_ids, expert_range)


def moe_fp8_triton(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor,
    a2_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
    tiles: tuple[Tile | StreamTile, Tile | StreamTile] | None = None,
) -> torch.Tensor:
    """``moe_fp8`` as three launches; ``tiles`` overrides the tables."""
    experts = expert_range or (0, w13.shape[0])
    table: Sequence[tuple[int, Tile | StreamTile, Tile | StreamTile]] = FP8_TILES
    if can_stream(w13, w2) and not is_invariant():
        table = HOPPER_FP8_TILES
    up_tile, down_tile = tiles or choose_tiles(table, expert_ids.numel(), experts[1])
    rows = gather_rows_triton(x, expert_ids, scores, experts, STATIC_FP8, a13_scale)
    if isinstance(up_tile, StreamTile):
        hidden = gate_up_stream(rows, w13, w13_scale, a2_scale, x.dtype, up_tile)
    else:
        hidden = gate_up_triton(rows, w13, w13_scale, a2_scale, x.dtype, up_tile)
    return _down(hidden, w2, w2_scale, down_tile, x, expert_ids, expert_range)


def _down(
    hidden: SortedRows,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    tile: Tile | StreamTile,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_range: tuple[int, int] | None,
) -> torch.Tensor:
    """The second product in token order."""
    out = output_rows(x, expert_ids, expert_range)
    if isinstance(tile, StreamTile):
        assert w2_scale is not None
        down_stream(hidden, w2, w2_scale, out, tile)
    else:
        down_triton(hidden, w2, w2_scale, out, tile)
    return combine_choices(out, expert_ids.shape[1])


def moe_nvfp4_triton(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w13_block_scale: torch.Tensor,
    w13_global_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_block_scale: torch.Tensor,
    w2_global_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """``moe_nvfp4`` on the GPU: each projection is decoded just before its product."""
    experts = expert_range or (0, w13.shape[0])
    up_tile, down_tile = tiles or choose_tiles(BF16_TILES, expert_ids.numel(), experts[1])
    rows = gather_rows_triton(x, expert_ids, scores, experts, PLAIN)
    weight = dequantize_nvfp4_triton(w13, w13_block_scale, w13_global_scale, x.dtype)
    hidden = gate_up_triton(rows, weight, None, None, x.dtype, up_tile)
    del weight
    weight = dequantize_nvfp4_triton(w2, w2_block_scale, w2_global_scale, x.dtype)
    return _down(hidden, weight, None, down_tile, x, expert_ids, expert_range)


def choose_tiles(
    table: Sequence[tuple[int, TileT, TileT]], num_rows: int, num_experts: int
) -> tuple[TileT, TileT]:
    """The (gate-up, down) tiles for this many rows spread evenly over the experts; always the same if invariant."""
    mean_rows = INVARIANT_ROWS if is_invariant() else num_rows / num_experts
    return next((up, down) for most_rows, up, down in table if mean_rows <= most_rows)


def output_rows(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_range: tuple[int, int] | None
) -> torch.Tensor:
    """One output row per (token, choice); zeros where a choice may belong to another rank."""
    make = torch.empty if expert_range is None else torch.zeros
    return make((expert_ids.numel(), x.shape[1]), dtype=x.dtype, device=x.device)


def combine_choices(rows: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T · k, M] -> [T, M], summed over the choices in a fixed order."""
    return rows if top_k == 1 else rows.view(-1, top_k, rows.shape[1]).sum(1)


def route_reference(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``router_logits[T, E]`` -> ``(expert_ids i32[T, k], scores f32[T, k])``: top-k of the logits, their sigmoids.

    Scores are not renormalised; a stable sort makes the lowest expert win ties.
    """
    logits, expert_ids = router_logits.float().sort(dim=-1, descending=True, stable=True)
    return expert_ids[:, :top_k].to(torch.int32), torch.sigmoid(logits[:, :top_k])


def moe_bf16_reference(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain-torch ``moe_bf16``, a pair of products an expert."""

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(swiglu(F.linear(rows, w13[expert])), w2[expert])

    return for_each_expert(x, expert_ids, scores, expert_range or (0, w13.shape[0]), mlp)


def moe_fp8_reference(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor,
    a2_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain-torch ``moe_fp8``; products of FP8 codes accumulate in float32."""

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        codes = quantize_fp8_reference(rows, a13_scale).float()
        gate_up = (F.linear(codes, w13[expert].float()) * (a13_scale * w13_scale[expert])).to(rows.dtype)
        codes = quantize_fp8_reference(swiglu(gate_up), a2_scale).float()
        return (F.linear(codes, w2[expert].float()) * (a2_scale * w2_scale[expert])).to(rows.dtype)

    return for_each_expert(x, expert_ids, scores, expert_range or (0, w13.shape[0]), mlp)


def moe_nvfp4_reference(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: torch.Tensor,
    w13_block_scale: torch.Tensor,
    w13_global_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_block_scale: torch.Tensor,
    w2_global_scale: torch.Tensor,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain-torch ``moe_nvfp4``, weight-only; one expert is dequantised at a time."""

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        up_weight = dequantize_nvfp4(w13[expert], w13_block_scale[expert], w13_global_scale, rows.dtype)
        down_weight = dequantize_nvfp4(w2[expert], w2_block_scale[expert], w2_global_scale, rows.dtype)
        return F.linear(swiglu(F.linear(rows, up_weight)), down_weight)

    return for_each_expert(x, expert_ids, scores, expert_range or (0, w13.shape[0]), mlp)


def for_each_expert(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    expert_range: tuple[int, int],
    mlp: ExpertMlp,
) -> torch.Tensor:
    """Run ``mlp`` once per expert that has tokens and add the results up, in float32 over k."""
    first, count = expert_range
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(count):
        tokens, choice = (expert_ids == first + expert).nonzero(as_tuple=True)
        if tokens.numel():
            rows = (x[tokens].float() * scores[tokens, choice, None].float()).to(x.dtype)
            out.index_add_(0, tokens, mlp(rows, expert).float())
    return out.to(x.dtype)
