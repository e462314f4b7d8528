"""Routed experts in four-bit arithmetic (W4A4): the Blackwell path of NVFP4 checkpoints.

Called by the NVFP4 experts of ``quant``. Five launches: gather and scale rows by expert, quantize, gate and up,
quantize, down. Calibration saw the input after the router's score, so quantizing follows it (MODEL_SPEC 2.2).
"""

from __future__ import annotations

import torch

from outrider.kernels._dispatch import ceil_div, on_gpu
from outrider.kernels.activation import swiglu
from outrider.kernels.moe import combine_choices, for_each_expert, output_rows
from outrider.kernels.moe_dispatch import PLAIN, gather_rows_triton
from outrider.kernels.w4a4 import (
    Fp4Tile,
    Fp4Weight,
    aot_spec,
    quantize_nvfp4_triton,
    w4a4_gemm_triton,
    w4a4_linear_reference,
)

EXPERT_TILES = (
    (2, Fp4Tile(16, 256, 2, 4), Fp4Tile(16, 256, 4, 4, split_k=4)),
    (16, Fp4Tile(16, 256, 2, 4), Fp4Tile(16, 256, 4, 4)),
    (64, Fp4Tile(64, 256, 2, 4), Fp4Tile(64, 256, 3, 4)),
    (1 << 30, Fp4Tile(128, 256, 2, 8), Fp4Tile(128, 256, 3, 8)),
)
"""(most rows an expert on average, gate-up tile, down tile) within 99 KiB of shared memory; not yet measured."""


def moe_w4a4(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Routed experts with NVFP4 weights and activations: ``x[T, M] -> [T, M]``.

    ``w13`` codes [E, 2I, M/2] (gate rows first), ``w2`` [E, M, I/2]; ids, scores and range as in ``moe.moe_bf16``.
    """
    if not on_gpu(x):
        return moe_w4a4_reference(x, expert_ids, scores, w13, w2, expert_range)
    mean_rows = ceil_div(expert_ids.numel(), w13.codes.shape[0])
    tiles = next((up, down) for most_rows, up, down in EXPERT_TILES if mean_rows <= most_rows)
    return moe_w4a4_triton(x, expert_ids, scores, w13, w2, expert_range, tiles)


def moe_w4a4_triton(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    expert_range: tuple[int, int] | None,
    tiles: tuple[Fp4Tile, Fp4Tile],
) -> torch.Tensor:
    """``moe_w4a4`` on the GPU."""
    num_rows = expert_ids.numel()
    rows = gather_rows_triton(x, expert_ids, scores, expert_range or (0, w13.codes.shape[0]), PLAIN)
    hidden = torch.empty((num_rows, w13.codes.shape[1] // 2), dtype=x.dtype, device=x.device)
    codes = quantize_nvfp4_triton(rows.x[:num_rows], w13.input_scale)
    w4a4_gemm_triton(codes, num_rows, w13, hidden, tiles[0], rows, gated=True)
    codes = quantize_nvfp4_triton(hidden, w2.input_scale)
    out = output_rows(x, expert_ids, expert_range)
    w4a4_gemm_triton(codes, num_rows, w2, out, tiles[1], rows)
    return combine_choices(out, expert_ids.shape[1])


def moe_w4a4_reference(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    expert_range: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Plain-torch ``moe_w4a4``, a pair of products an expert."""

    def mlp(rows: torch.Tensor, expert: int) -> torch.Tensor:
        hidden = swiglu(w4a4_linear_reference(rows, w13.expert(expert)))
        return w4a4_linear_reference(hidden, w2.expert(expert))

    return for_each_expert(x, expert_ids, scores, expert_range or (0, w13.codes.shape[0]), mlp)


BLACKWELL_AOT_SPECS = [
    aot_spec(up, grouped=True, gated=True) for _, up, _ in (EXPERT_TILES[0], EXPERT_TILES[-1])
]
