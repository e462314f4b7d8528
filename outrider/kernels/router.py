"""The router of large steps: logits, top-k and scores of normed rows in one kernel.

Called by ``models.moe``. The rows of a step are few for a matrix product of 16 outputs, so its depth is split over
programs; the last of them to end adds the parts, in order, and chooses. A row's sum follows neither the number of rows
nor their company. Steps of a few tokens route inside ``moe_few`` and ``moe_one_nvfp4``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import arrival_counters, ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.gemm import linear
from outrider.kernels.moe import route_reference


class RouterTile(NamedTuple):
    """Launch constants: rows and columns of a tile, parts of the depth, warps, pipeline stages."""

    rows: int
    step: int
    split: int
    warps: int
    stages: int


ROUTER_TILES = ((64, RouterTile(16, 128, 8, 4, 4)), (math.inf, RouterTile(16, 128, 8, 4, 2)))
"""(most experts, tile): 5 steps of Scout's 5,120 columns a part, 256 programs at 512 rows.

Not tuned. H200, 2026-11-26, 16 experts, 32 / 512 / 2,048 / 8,192 rows: 5.6 / 6.5 / 11.6 / 35.5 us, a product and then
the choice 8.5 / 9.1 / 10.4 / 25.4: benchmarks/results/trials_h200.txt
"""


def route_rows(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``moe.route_reference`` of ``x[T, M] @ weight[E, M].T``: ids int32 and sigmoid scores float32, both ``[T, k]``.

    Logits are accumulated in float32 and rounded to the dtype of ``x``, as the product alone would be.
    """
    op = route_rows_triton if on_gpu(x) else route_rows_reference
    return op(x, weight, top_k)


def route_rows_reference(
    x: torch.Tensor, weight: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of ``route_rows`` as two operations."""
    return route_reference(linear(x, weight), top_k)


@triton.jit(do_not_specialize=("num_rows",))
def _route_rows_kernel(
    x_ptr,
    weight_ptr,
    partial_ptr,
    arrivals_ptr,
    ids_ptr,
    scores_ptr,
    num_rows,
    size,
    num_experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program multiplies one part of the depth of ``ROWS`` rows."""
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BINS)
    steps = tl.cdiv(size, STEP * SPLIT)
    logits = tl.zeros((ROWS, BINS), tl.float32)
    for step in range(part * steps, part * steps + steps):
        columns = step * STEP + tl.arange(0, STEP)
        x_mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
        w_mask = (experts < num_experts)[:, None] & (columns < size)[None, :]
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * size + columns[None, :], mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr + experts[:, None] * size + columns[None, :], mask=w_mask, other=0.0)
        logits = tl.dot(x, tl.trans(weight), logits, input_precision="ieee")
    places = rows[:, None] * BINS + experts[None, :]
    plane = num_rows * BINS
    mask = (rows < num_rows)[:, None] & (experts >= 0)[None, :]
    tl.store(partial_ptr + part * plane + places, logits, mask=mask)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == SPLIT - 1:
        tl.store(arrivals_ptr + block, 0)
        logits = tl.zeros((ROWS, BINS), tl.float32)
        for split in tl.static_range(SPLIT):
            logits += tl.load(
                partial_ptr + split * plane + places, mask=mask, other=0.0, cache_modifier=".cg"
            )
        logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
        logits = tl.where((experts < num_experts)[None, :], logits, float("-inf"))
        for choice in tl.static_range(K):
            best, expert = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
            tl.store(ids_ptr + rows * K + choice, expert.to(tl.int32), mask=rows < num_rows)
            tl.store(scores_ptr + rows * K + choice, tl.sigmoid(best), mask=rows < num_rows)
            logits = tl.where(experts[None, :] == expert[:, None], float("-inf"), logits)


def route_rows_triton(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``route_rows`` as one kernel."""
    x = x.contiguous()
    num_rows, size = x.shape
    num_experts = weight.shape[0]
    ids = torch.empty((num_rows, top_k), dtype=torch.int32, device=x.device)
    scores = torch.empty((num_rows, top_k), dtype=torch.float32, device=x.device)
    bins = power_of_two_at_least(num_experts, 16)
    tile = next(tile for most_experts, tile in ROUTER_TILES if num_experts <= most_experts)
    partial = torch.empty((tile.split, num_rows, bins), dtype=torch.float32, device=x.device)
    _route_rows_kernel[(ceil_div(num_rows, tile.rows), tile.split)](
        x,
        weight,
        partial,
        arrival_counters(x.device),
        ids,
        scores,
        num_rows,
        size,
        num_experts,
        K=top_k,
        ROWS=tile.rows,
        STEP=tile.step,
        SPLIT=tile.split,
        BINS=bins,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return ids, scores


_ROUTE = {
    "x_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "arrivals_ptr": "*i32",
    "ids_ptr": "*i32",
    "scores_ptr": "*fp32",
    "num_rows": "i32",
    "size": "i32",
    "num_experts": "i32",
}


def _aot_spec(bins: int, tile: RouterTile):
    constants = {"K": 1, "ROWS": tile.rows, "STEP": tile.step, "SPLIT": tile.split, "BINS": bins}
    return _route_rows_kernel, _ROUTE, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


AOT_SPECS = [_aot_spec(16, ROUTER_TILES[0][1])]
