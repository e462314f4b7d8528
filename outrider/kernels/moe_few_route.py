"""The first kernel of ``moe_few`` and ``moe_one_nvfp4``: residual addition, RMS norm, router and rows of few tokens.

Launched by those two alone. Every load that depends on nothing is issued before the first value is used, so that a
step of one token waits for one round trip to memory.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from outrider.kernels._dispatch import power_of_two_at_least
from outrider.kernels.fp8_row import plane_place
from outrider.kernels.moe_few_kernels import FEW_ROWS
from outrider.kernels.nvfp4_row import half_block_scale, half_place
from outrider.kernels.overlap import wait_for_inputs
from outrider.kernels.quantize import to_fp8

ROUTE_GROUP, ROUTE_STEP, ROUTE_WARPS = 16, 1024, 16
"""Router rows and columns of a tile, warps. Scout's 164 KB of router weights lie in the registers of one program.

Not tuned. H200, 2026-11-26, norm and route of one token: 5.2 us alone, 6.5 in the engine: trials_h200.txt
"""


def route_options(size: int) -> dict[str, int]:
    """Launch constants of ``_norm_route_kernel`` for rows of ``size``."""
    step = min(ROUTE_STEP, power_of_two_at_least(size, 128))
    return {"SIZE": size, "GROUP": ROUTE_GROUP, "STEP": step, "num_warps": ROUTE_WARPS}


@triton.jit
def _router_tiles(
    router_ptr, first, EXPERTS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr
):
    """Router rows of ``GROUP`` experts from ``first`` on, as tiles of ``STEP`` columns."""
    experts = first + tl.arange(0, GROUP)
    tiles = ()
    for start in tl.static_range(0, SIZE, STEP):
        part = start + tl.arange(0, STEP)
        mask = (experts < EXPERTS)[:, None] & (part < SIZE)[None, :]
        tiles = tiles + (tl.load(router_ptr + experts[:, None] * SIZE + part[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _best_of_group(
    tiles, row, first,
    MODEL_DTYPE: tl.constexpr, EXPERTS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``(largest logit, its expert)`` of a group; the first of equal ones."""
    sums = tl.zeros((GROUP, STEP), tl.float32)
    for i in tl.static_range(len(tiles)):
        sums += tiles[i].to(tl.float32) * row[i].to(tl.float32)[None, :]
    logits = tl.sum(sums, 1).to(MODEL_DTYPE).to(tl.float32)
    logits = tl.where(first + tl.arange(0, GROUP) < EXPERTS, logits, float("-inf"))
    best, place = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    return best, first + place.to(tl.int32)


@triton.jit
def _norm_route_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    router_ptr,
    routed_scale_ptr,
    shared_scale_ptr,
    rows_ptr,
    half_ptr,
    ids_ptr,
    x_stride,
    residual_stride,
    eps,
    first_expert,
    num_local,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROOT: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program adds, normalises and routes one token and writes its row twice: scaled by the score, and as it is.

    QUANTIZE: both in e4m3, rows of one tensor. Else, for the only token, the scaled row as half blocks (their scales,
    all the same, go to ``routed_scale_ptr``; ROOT is the root of SIZE) and the row as it is in planes of float32.
    """
    token = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, STEP)
    first_tiles = _router_tiles(router_ptr, 0, EXPERTS, SIZE, GROUP, STEP)
    norm = ()
    for start in tl.static_range(0, SIZE, STEP):
        norm = norm + (tl.load(norm_ptr + start + columns, mask=start + columns < SIZE, other=0.0),)
    if QUANTIZE:
        routed_scale = tl.load(routed_scale_ptr)
        shared_scale = tl.load(shared_scale_ptr)
    else:
        # No value of a normed row exceeds the root of its size times the largest weight.
        largest = tl.full((STEP,), 2.0**-100, tl.float32)
        for i in tl.static_range(len(norm)):
            largest = tl.maximum(largest, tl.abs(norm[i].to(tl.float32)))
        half_scale = half_block_scale(tl.max(largest, 0) * ROOT)
        blocks = tl.arange(0, STEP // 16)
    wait_for_inputs(OVERLAP)
    x_ptr += token.to(tl.int64) * x_stride
    residual_ptr += token.to(tl.int64) * residual_stride
    new = ()
    old = ()
    for start in tl.static_range(0, SIZE, STEP):
        inside = start + columns < SIZE
        new = new + (tl.load(x_ptr + start + columns, mask=inside, other=0.0),)
        old = old + (tl.load(residual_ptr + start + columns, mask=inside, other=0.0),)
    squares = tl.zeros((STEP,), tl.float32)
    summed = ()
    for i in tl.static_range(len(new)):
        x = (new[i].to(tl.float32) + old[i].to(tl.float32)).to(dtype)
        squares += x.to(tl.float32) * x.to(tl.float32)
        summed = summed + (x,)
    inv_rms = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
    row = ()
    for i in tl.static_range(len(summed)):
        tl.store(residual_ptr + i * STEP + columns, summed[i], mask=i * STEP + columns < SIZE)
        unit = (summed[i].to(tl.float32) * inv_rms).to(dtype)
        row = row + ((unit.to(tl.float32) * norm[i].to(tl.float32)).to(dtype),)
    best, expert = _best_of_group(first_tiles, row, 0, dtype, EXPERTS, GROUP, STEP)
    for first in tl.range(GROUP, EXPERTS, GROUP):
        tiles = _router_tiles(router_ptr, first, EXPERTS, SIZE, GROUP, STEP)
        other, place = _best_of_group(tiles, row, first, dtype, EXPERTS, GROUP, STEP)
        expert = tl.where(other > best, place, expert)
        best = tl.maximum(best, other)
    local = expert - first_expert
    tl.store(ids_ptr + token, tl.where((local >= 0) & (local < num_local), local, -1))
    score = tl.sigmoid(best)
    for i in tl.static_range(len(row)):
        wide = row[i].to(tl.float32)
        inside = i * STEP + columns < SIZE
        scaled = (wide * score).to(dtype).to(tl.float32)
        if QUANTIZE:
            target = rows_ptr + token * SIZE + i * STEP + columns
            tl.store(target, to_fp8(scaled, routed_scale), mask=inside)
            tl.store(target + ROWS * SIZE, to_fp8(wide, shared_scale), mask=inside)
        else:
            tl.store(rows_ptr + plane_place(i * STEP + columns), wide, mask=inside)
            tl.store(
                half_ptr + half_place(i * STEP + columns), (scaled / half_scale).to(tl.float16), mask=inside
            )
            tl.store(
                routed_scale_ptr + i * (STEP // 16) + blocks, half_scale, mask=i * STEP + blocks * 16 < SIZE
            )


_ROUTE = {
    "x_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "norm_ptr": "*bf16",
    "router_ptr": "*bf16",
    "routed_scale_ptr": "*fp32",
    "shared_scale_ptr": "*fp32",
    "rows_ptr": "*fp8e4nv",
    "half_ptr": "*fp16",
    "ids_ptr": "*i32",
    "x_stride": "i32",
    "residual_stride": "i32",
    "eps": "fp32",
    "first_expert": "i32",
    "num_local": "i32",
}
AOT_SPECS = [
    (
        _norm_route_kernel,
        _ROUTE if quantize else {**_ROUTE, "rows_ptr": "*fp32"},
        {
            "EXPERTS": experts,
            "SIZE": 5120,
            "ROWS": FEW_ROWS,
            "QUANTIZE": quantize,
            "ROOT": 72.0,
            "GROUP": ROUTE_GROUP,
            "STEP": ROUTE_STEP,
            "OVERLAP": True,
        },
        {"num_warps": ROUTE_WARPS},
        ("x_ptr", "residual_ptr", "norm_ptr", "router_ptr", "rows_ptr", "x_stride", "residual_stride"),
    )
    for experts, quantize in ((16, True), (128, True), (16, False))
]
