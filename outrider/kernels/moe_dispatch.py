"""MoE bookkeeping on the device: top-k routing, and rows gathered by expert, scaled and quantised.

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

MOST_PROGRAMS = 2048
"""Rows up to which the gather has a program for each: enough to fill any GPU. Each reads all expert ids."""

MOST_SCANNED = 2048
"""Expert ids that a program of the gather counts at a time."""

PLAIN, STATIC_FP8, DYNAMIC_FP8, STREAM_FP8 = 0, 1, 2, 3
"""What the gathered rows become: the model dtype, e4m3 with a given scale, e4m3 with a scale a row, and that with
the columns in the order of repacked NVFP4 weights."""


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


@triton.jit(do_not_specialize=("num_tokens",))
def _route_kernel(
    logits_ptr,
    ids_ptr,
    scores_ptr,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, BINS)
    mask = (tokens[:, None] < num_tokens) & (experts[None, :] < num_experts)
    offsets = tokens[:, None].to(tl.int64) * num_experts + experts[None, :]
    logits = tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    for choice in tl.static_range(K):
        best, expert = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(ids_ptr + tokens * K + choice, expert.to(tl.int32), mask=tokens < num_tokens)
        tl.store(scores_ptr + tokens * K + choice, tl.sigmoid(best), mask=tokens < num_tokens)
        logits = tl.where(experts[None, :] == expert[:, None], float("-inf"), logits)


@triton.jit
def _local_expert(ids_ptr, rows, num_rows, first_expert, num_experts, FOREIGN: tl.constexpr):
    """The local experts of flat choices ``rows``; ``FOREIGN`` for another rank's and behind the last choice."""
    expert = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1) - first_expert
    return tl.where((rows < num_rows) & (expert >= 0) & (expert < num_experts), expert, FOREIGN)


@triton.jit
def _store_offsets(
    ids_ptr, offsets_ptr, num_rows, first_expert, num_experts, BINS: tl.constexpr, SCAN: tl.constexpr
):
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_rows, SCAN):
        rows = start + tl.arange(0, SCAN)
        expert = _local_expert(ids_ptr, rows, num_rows, first_expert, num_experts, BINS - 1)
        total += tl.histogram(expert, BINS)
    tl.store(offsets_ptr + bins, tl.cumsum(total, 0) - total, mask=bins <= num_experts)


@triton.jit
def _find_slot(ids_ptr, row, expert, num_rows, first_expert, num_experts, SCAN: tl.constexpr):
    """Where row ``row`` of local expert ``expert`` goes: behind all rows of lower experts and its expert's earlier."""
    before = tl.zeros((SCAN,), tl.int32)
    for start in range(0, num_rows, SCAN):
        rows = start + tl.arange(0, SCAN)
        other = _local_expert(ids_ptr, rows, num_rows, first_expert, num_experts, 2147483647)
        before += ((other < expert) | ((other == expert) & (rows < row))).to(tl.int32)
    return tl.sum(before, 0).to(tl.int64)


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
    columns = tl.arange(0, BLOCK)
    mask = columns < row_size
    for row in range(first_row, tl.minimum(first_row + ROWS, num_rows)):
        expert = tl.load(ids_ptr + row) - first_expert
        if (expert >= 0) & (expert < num_experts):
            # The row is on its way from memory while its place is counted.
            x = tl.load(x_ptr + (row // TOP_K) * row_size.to(tl.int64) + columns, mask=mask, other=0.0)
            score = tl.load(scores_ptr + row)
            slot = _find_slot(ids_ptr, row, expert, num_rows, first_expert, num_experts, SCAN)
            tl.store(index_ptr + slot, row)
            # The model rounds the scaled input before anything else sees it.
            scaled = (x.to(tl.float32) * score).to(x.dtype)
            if MODE == 0:
                tl.store(sorted_ptr + slot * row_size + columns, scaled, mask=mask)
            else:
                scaled = scaled.to(tl.float32)
                if MODE == 1:
                    scale = tl.load(in_scale_ptr)
                else:
                    scale = row_scale(scaled)
                    tl.store(out_scale_ptr + slot, scale)
                codes = to_fp8(scaled, scale)
                if MODE == 3:
                    codes = to_stream_order(codes)
                tl.store(sorted_ptr + slot * row_size + columns, codes, mask=mask)


def route_triton(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``moe.route`` as one Triton kernel."""
    router_logits = router_logits.contiguous()
    num_tokens, num_experts = router_logits.shape
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=router_logits.device)
    scores = torch.empty((num_tokens, top_k), dtype=torch.float32, device=router_logits.device)
    block = 16
    _route_kernel[(ceil_div(num_tokens, block),)](
        router_logits,
        ids,
        scores,
        num_tokens,
        num_experts,
        K=top_k,
        BLOCK=block,
        BINS=power_of_two_at_least(num_experts, 16),
        num_warps=2,
    )
    return ids, scores


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
    row_scale = (
        torch.empty(capacity, dtype=torch.float32, device=x.device)
        if mode in (DYNAMIC_FP8, STREAM_FP8)
        else None
    )
    rows = power_of_two_at_least(ceil_div(num_rows, MOST_PROGRAMS), 1)
    _gather_kernel[(1 + ceil_div(num_rows, rows),)](
        x,
        expert_ids,
        scores,
        in_scale,
        gathered,
        index,
        offsets,
        row_scale,
        num_rows,
        row_size,
        first_expert,
        num_experts,
        TOP_K=top_k,
        MODE=mode,
        ROWS=rows,
        BINS=power_of_two_at_least(num_experts + 1, 16),
        SCAN=min(MOST_SCANNED, power_of_two_at_least(num_rows, 128)),
        BLOCK=power_of_two_at_least(row_size, 512 if mode == STREAM_FP8 else 128),
        num_warps=8,
    )
    return SortedRows(
        gathered, index, offsets, row_scale if mode in (DYNAMIC_FP8, STREAM_FP8) else in_scale, num_rows
    )


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
    (
        _route_kernel,
        {
            "logits_ptr": "*bf16",
            "ids_ptr": "*i32",
            "scores_ptr": "*fp32",
            "num_tokens": "i32",
            "num_experts": "i32",
        },
        {"K": 2, "BLOCK": 16, "BINS": 16},
    ),
    (_gather_kernel, _GATHER_SIGNATURE, {**_GATHER_CONSTANTS, "MODE": STATIC_FP8}),
    (_gather_kernel, _GATHER_SIGNATURE, {**_GATHER_CONSTANTS, "MODE": DYNAMIC_FP8}),
    (_gather_kernel, _GATHER_SIGNATURE, {**_GATHER_CONSTANTS, "MODE": STREAM_FP8}),
]
