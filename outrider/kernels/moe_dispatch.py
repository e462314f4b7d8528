"""MoE bookkeeping on the device: rows gathered by expert, scaled and quantised.

Called by the launchers of ``moe``. No host synchronisation and fixed grids, so it lives in CUDA graphs. The sort
is stable (a counting sort: every program counts what goes before its rows), so results do not depend on scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, power_of_two_at_least
from outrider.kernels.nvfp4_decode import to_stream_order
from outrider.kernels.quantize import row_scale, to_fp8

ROW_PADDING = 256
"""Spare rows behind every expert-sorted buffer, so that a tile may load past the last row."""

LONE_ROWS = 2048
"""Rows up to which the gather has a program for each; above it has no more than half as many programs.

Each of them reads all expert ids. H200, 2026-11-27, rows of 5,120 in e4m3: 4.9 us at 512, 8.3 at 1,024, 15.4 at 2,048,
76.3 at 8,192: kernels_h200.json. On the way there, 2026-11-26, 1,315 rows in stream order: sixteen rows a program 28.4
us, one 12.1 (in 4 warps 12.8); in a form with later loads 14.9, there half as many programs from 1,024 rows on 14.2:
trials_h200.txt
"""

MOST_SCANNED = 2048
"""Expert ids that a program of the gather counts at a time for one or two rows; for more, fewer. Not tuned."""

WARPS = 8
"""Of a program of the gather: see above."""

PLAIN, STATIC_FP8, STREAM_FP8 = 0, 1, 2
"""What the gathered rows become: the model dtype, e4m3 with a given scale, or e4m3 with a scale a row and the columns
in the order of repacked NVFP4 weights."""


@dataclass(frozen=True)
class SortedRows:
    """Rows grouped by local expert. Row r of ``x`` belongs to flat choice ``index[r]`` (token · k + choice).

    ``offsets`` i32 [count + 1] are the groups' bounds; ``scale`` is f32 of one element, or [rows] if dynamic.
    """

    x: torch.Tensor
    index: torch.Tensor
    offsets: torch.Tensor
    scale: torch.Tensor | None
    num_rows: int


@triton.jit
def _local_experts(ids_ptr, rows, num_rows, first_expert, num_experts):
    """The local experts of flat choices ``rows``; ``num_experts`` for another rank's and behind the last choice."""
    expert = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1) - first_expert
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)


@triton.jit
def _store_offsets(
    ids_ptr, offsets_ptr, num_rows, first_expert, num_experts, BINS: tl.constexpr, SCAN: tl.constexpr
):
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_rows, SCAN):
        rows = start + tl.arange(0, SCAN)
        total += tl.histogram(_local_experts(ids_ptr, rows, num_rows, first_expert, num_experts), BINS)
    tl.store(offsets_ptr + bins, tl.cumsum(total, 0) - total, mask=bins <= num_experts)


@triton.jit
def _find_slots(
    ids_ptr, first_row, num_rows, first_expert, num_experts, ROWS: tl.constexpr, SCAN: tl.constexpr
):
    """Where ``ROWS`` rows go, [ROWS]: each behind the rows of lower experts and the earlier ones of its own."""
    rows = first_row + tl.arange(0, ROWS)
    keys = _local_experts(ids_ptr, rows, num_rows, first_expert, num_experts) * num_rows + rows
    before = tl.zeros((ROWS, SCAN), tl.int32)
    for start in range(0, num_rows, SCAN):
        others = start + tl.arange(0, SCAN)
        other_keys = _local_experts(ids_ptr, others, num_rows, first_expert, num_experts) * num_rows + others
        before += (other_keys[None, :] < keys[:, None]).to(tl.int32)
    return tl.sum(before, 1)


@triton.jit
def _load_row(
    x_ptr,
    ids_ptr,
    scores_ptr,
    row,
    end,
    row_size,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Input [BLOCK], score and local expert of a flat choice; -1, and no input read, where that is not here."""
    expert = tl.load(ids_ptr + tl.minimum(row, end - 1)) - first_expert
    expert = tl.where((row < end) & (expert >= 0) & (expert < num_experts), expert, -1)
    columns = tl.arange(0, BLOCK)
    size = tl.where(expert >= 0, row_size, 0)
    x = tl.load(x_ptr + (row // TOP_K) * row_size.to(tl.int64) + columns, mask=columns < size, other=0.0)
    return x, tl.load(scores_ptr + tl.minimum(row, end - 1)), expert


@triton.jit(do_not_specialize=("num_rows", "first_expert"))
def _gather_kernel(
    x_ptr,
    ids_ptr,
    scores_ptr,
    in_scale_ptr,
    sorted_ptr,
    index_ptr,
    offsets_ptr,
    out_scale_ptr,
    num_rows,
    row_size,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Counting sort: the first program stores the bounds, every other one finds the places of its rows by itself.
    if tl.program_id(0) == 0:
        _store_offsets(ids_ptr, offsets_ptr, num_rows, first_expert, num_experts, BINS, SCAN)
        return
    first_row = (tl.program_id(0) - 1) * ROWS
    end = tl.minimum(first_row + ROWS, num_rows)
    columns = tl.arange(0, BLOCK)
    mask = columns < row_size
    # A program's first row is on its way from memory while its places are counted.
    if MODE == 1:
        in_scale = tl.load(in_scale_ptr)
    x, score, expert = _load_row(
        x_ptr, ids_ptr, scores_ptr, first_row, end, row_size, first_expert, num_experts, TOP_K, BLOCK
    )
    slots = _find_slots(ids_ptr, first_row, num_rows, first_expert, num_experts, ROWS, SCAN)
    for row in range(first_row, end):
        if expert >= 0:
            slot = tl.sum(tl.where(tl.arange(0, ROWS) == row - first_row, slots, 0), 0).to(tl.int64)
            tl.store(index_ptr + slot, row)
            # The model rounds the scaled input before anything else sees it.
            scaled = (x.to(tl.float32) * score).to(x.dtype)
            if MODE == 0:
                out = scaled
            elif MODE == 1:
                out = to_fp8(scaled.to(tl.float32), in_scale)
            else:
                scale = row_scale(scaled.to(tl.float32))
                tl.store(out_scale_ptr + slot, scale)
                out = to_stream_order(to_fp8(scaled.to(tl.float32), scale))
            tl.store(sorted_ptr + slot * row_size + columns, out, mask=mask)
        if ROWS > 1:
            x, score, expert = _load_row(
                x_ptr, ids_ptr, scores_ptr, row + 1, end, row_size, first_expert, num_experts, TOP_K, BLOCK
            )


def gather_rows_triton(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    scores: torch.Tensor,
    expert_range: tuple[int, int],
    mode: int,
    in_scale: torch.Tensor | None = None,
) -> SortedRows:
    """Rows of ``x`` [T, M], one per (token, choice) of a local expert, times their score, grouped by expert."""
    x = x.contiguous()
    first_expert, num_experts = expert_range
    top_k = expert_ids.shape[1]
    num_rows, row_size = expert_ids.numel(), x.shape[1]
    capacity = num_rows + ROW_PADDING
    dtype = x.dtype if mode == PLAIN else torch.float8_e4m3fn
    gathered = torch.empty((capacity, row_size), dtype=dtype, device=x.device)
    index = torch.empty(num_rows, dtype=torch.int32, device=x.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=x.device)
    scale = in_scale
    if mode == STREAM_FP8:
        scale = torch.empty(capacity, dtype=torch.float32, device=x.device)
    rows = 1 if num_rows <= LONE_ROWS else power_of_two_at_least(ceil_div(2 * num_rows, LONE_ROWS), 1)
    scan = min(MOST_SCANNED // max(1, rows // 2), power_of_two_at_least(num_rows, 128))
    _gather_kernel[(1 + ceil_div(num_rows, rows),)](
        x,
        expert_ids,
        scores,
        in_scale,
        gathered,
        index,
        offsets,
        scale,
        num_rows,
        row_size,
        first_expert,
        num_experts,
        TOP_K=top_k,
        MODE=mode,
        ROWS=rows,
        BINS=power_of_two_at_least(num_experts + 1, 16),
        SCAN=scan,
        BLOCK=power_of_two_at_least(row_size, 512 if mode == STREAM_FP8 else 128),
        num_warps=WARPS,
    )
    return SortedRows(gathered, index, offsets, scale, num_rows)


_GATHER_SIGNATURE = {
    "x_ptr": "*bf16",
    "ids_ptr": "*i32",
    "scores_ptr": "*fp32",
    "in_scale_ptr": "*fp32",
    "sorted_ptr": "*fp8e4nv",
    "index_ptr": "*i32",
    "offsets_ptr": "*i32",
    "out_scale_ptr": "*fp32",
    "num_rows": "i32",
    "row_size": "i32",
    "first_expert": "i32",
    "num_experts": "i32",
}
_GATHER_CONSTANTS = {
    "TOP_K": 1,
    "ROWS": 1,
    "BINS": 32,
    "SCAN": 2048,
    "BLOCK": 8192,
}

AOT_SPECS = [
    (_gather_kernel, _GATHER_SIGNATURE, {**_GATHER_CONSTANTS, "MODE": STATIC_FP8}, {"num_warps": WARPS}),
    (_gather_kernel, _GATHER_SIGNATURE, {**_GATHER_CONSTANTS, "MODE": STREAM_FP8}, {"num_warps": WARPS}),
]
