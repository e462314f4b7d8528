"""Routed experts with repacked NVFP4 weights and FP8 activations: the Hopper path.

Called by ``quant``. Weights are decoded in registers (``nvfp4_stream``) to e4m3 values, rounded after block scaling;
activations get a scale a row. Other devices and ragged shapes take ``moe.moe_nvfp4``.
"""

from __future__ import annotations

import math

import torch

from outrider.kernels._dispatch import ceil_div
from outrider.kernels.moe import combine_choices, output_rows
from outrider.kernels.moe_dispatch import STREAM_FP8, SortedRows, gather_rows_triton
from outrider.kernels.nvfp4_repack import quantize_stream
from outrider.kernels.nvfp4_stream import StreamTile, stream_triton

STREAM_TILES = (
    (1, StreamTile(16, 16, 4, 3, 4), StreamTile(16, 16, 4, 3, 4, split_k=4)),
    (12, StreamTile(16, 16, 4, 4, 4), StreamTile(16, 16, 4, 4, 4)),
    (25, StreamTile(16, 32, 8, 4, 2), StreamTile(16, 32, 8, 4, 2)),
    (60, StreamTile(32, 64, 8, 3, 2), StreamTile(32, 64, 8, 3, 2)),
    (math.inf, StreamTile(64, 128, 8, 4, 1), StreamTile(64, 128, 8, 4, 1)),
)
"""(most rows an expert on average, gate-up tile, down tile), as measured on an H200.

2026-11-27, routed experts of a layer, random routing, under a lasting load of 690 W, beside tiles of one width and
whole copies, the median of three turns in one call: 107 tokens 298 (325) us, 240 321 (350), 400 350 (362), 512 382
(432), 640 397 (434), 1,024 542 (627), 1,280 626 (668), 2,048 832 (916), 4,096 1,477 (1,526); in another 512 366 (400),
768 408 (430), 912 460 (490), 1,024 526 (648). Of 1,664 nothing is sure, 630 (704) and 670 (634): trials_h200.txt.
"""


def moe_nvfp4_repacked(
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
    tiles: tuple[StreamTile, StreamTile] | None = None,
) -> torch.Tensor:
    """``moe.moe_nvfp4`` with weights reordered by ``repack_nvfp4_`` (``w13`` gated); ``tiles`` overrides the table."""
    num_rows, top_k = expert_ids.numel(), expert_ids.shape[1]
    mean_rows = ceil_div(num_rows, w13.shape[0])
    tiles = tiles or next((up, down) for most, up, down in STREAM_TILES if mean_rows <= most)
    rows = gather_rows_triton(x, expert_ids, scores, expert_range or (0, w13.shape[0]), STREAM_FP8)
    hidden = torch.empty((num_rows, w13.shape[1] // 2), dtype=x.dtype, device=x.device)
    stream_triton(rows, w13, w13_block_scale, w13_global_scale, hidden, tiles[0], gated=True)
    codes, scale = quantize_stream(hidden)
    rows = SortedRows(codes, rows.index, rows.offsets, scale, num_rows)
    out = output_rows(x, expert_ids, expert_range)
    stream_triton(rows, w2, w2_block_scale, w2_global_scale, out, tiles[1], gated=False)
    return combine_choices(out, top_k)
