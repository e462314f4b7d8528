"""Dense matrix products: plain, and FP8 with static scales.

Called by the linear layers of ``quant``. Never quantises anything itself. Few rows: a Triton kernel that streams
the weights with their rows on the tensor core's M side. Many rows: cuBLASLt through torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import arrival_counters, ceil_div, num_sms, on_gpu, power_of_two_at_least
from outrider.kernels.gemv import GemvTile, gemv_triton
from outrider.kernels.invariant import is_invariant
from outrider.kernels.overlap import overlap_options, prefetch_rows, wait_for_inputs


@dataclass(frozen=True)
class SkinnyTile:
    """Launch constants of the few-rows product: weight rows and depth of a tile, pipeline stages, warps.

    ``programs_per_sm``: the depth is split until about that many programs a multiprocessor exist; 0 never splits it.
    ``prefetch``: bytes of each FP8 weight row that a program fetches into the L2 cache while the kernel before runs: a
    power of two. ``rows``: rows of x in a tile, 0 for as many as there are.
    """

    outputs: int
    depth: int
    stages: int
    warps: int
    programs_per_sm: int
    prefetch: int = 0
    rows: int = 0


SKINNY_TILES = {
    torch.float8_e4m3fn: (
        (16, SkinnyTile(64, 256, 5, 4, 2, prefetch=1024)),
        (64, SkinnyTile(64, 256, 4, 4, 2)),
    ),
    torch.bfloat16: (
        (16, SkinnyTile(64, 128, 5, 4, 2)),
        (64, SkinnyTile(64, 128, 4, 4, 2)),
    ),
}
"""(most rows, tile) per weight dtype; above the last entry cuBLASLt runs.

H200, e4m3: a whole layer of 4 and 16 tokens 185 and 384 us, other tiles 184 to 196 and 384 to 390 (2026-11-26,
kernels_few_h200.json); the four products of a layer at 64 rows 80.6 us, other tiles 83.8 to 113.8, cuBLASLt 94.2
(2026-11-23, kernels_gemm_h200.json), at 72 rows this tile 125.5, cuBLASLt 92.0 (2026-11-26, trials_h200.txt).
H200, bf16, 2026-11-27, a head of 202,048 outputs: one row 461 us, other tiles 456 and 457, cuBLAS 481; the tile of 64
rows is not timed, with 5 stages 505 us, other tiles 487 and 520, cuBLAS 534 (kernels_h200.json).
"""

MOST_FEW_ROWS = SKINNY_TILES[torch.bfloat16][-1][0]
"""Rows up to which a bf16 product takes one of these tiles."""

GEMV_TILE: GemvTile | None = GemvTile(2, 1024, 2)
"""For products of one row; None: the few-rows tiles take it.

H200, 2026-11-26, a whole layer of one token: 109 us, with other sizes 109 to 117, with few-rows tiles 114 to 123:
kernels_few_h200.json
"""

INVARIANT_TILES = {
    torch.float8_e4m3fn: SkinnyTile(64, 256, 4, 4, 0, rows=64),
    torch.bfloat16: SkinnyTile(64, 128, 4, 4, 0, rows=64),
}
"""The one tile of ``--deterministic``: its sums do not follow the number of rows.

Not tuned. H200, 2026-11-27: the whole mode takes 1.56 to 1.59 times an ordinary run's time: determinism_h200.json
"""

ONE_SCALE_ROWS: tuple[tuple[float, int], ...] = ((8192, 1536), (math.inf, 960))
"""(most outputs, most rows) for which cuBLASLt is asked with one scale, where there is only one: it has better kernels.

H200, 2026-11-27, a scale a row and a column / one scale, us: 5,120 x 8,192 at 72 rows 24.8 / 15.9, 256 27.7 / 22.8, 512
46.0 / 34.3, 1,024 69.0 / 60.0, 1,536 94.5 / 89.2, 2,048 115.8 / 117.6; 16,384 x 5,120 at 512 63.2 / 61.5, 1,024 115.6 /
118.3: trials_h200.txt
"""

MAX_SPLIT_K = 16
"""Bounds the partial sums; not tuned. On the 132 multiprocessors of an H200 only up to 960 outputs would want more."""


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x[T, K] @ weight[N, K].T -> [T, N]`` in the common dtype, float32 accumulation."""
    tile = _skinny_tile(x.shape[0], weight)
    if tile is None:
        return F.linear(x, weight)
    return skinny_triton(x, weight, None, None, x.dtype, tile)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    one_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x · weightᵀ) · x_scale · w_scale -> [T, N]`` with a float32 accumulator.

    ``x`` e4m3 [T, K], ``weight`` e4m3 [N, K]; ``x_scale`` f32 of one element or [T] (a scale a row), or None where
    ``w_scale`` holds it too; ``w_scale`` f32 [N], one value an output, which keeps fused shards with different
    scales exact. ``one_scale`` f32 of one element: both together, where they are the same for all rows and outputs.
    """
    if not on_gpu(x):
        return fp8_linear_reference(x, weight, x_scale, w_scale, out_dtype)
    lone = lone_row_tile(x.shape[0], weight)
    if lone is not None:
        return gemv_triton(x, weight, x_scale, w_scale, out_dtype, lone)
    tile = _skinny_tile(x.shape[0], weight)
    if tile is None:
        return fp8_linear_cublas(x, weight, x_scale, w_scale, out_dtype, one_scale)
    return skinny_triton(x, weight, x_scale, w_scale, out_dtype, tile)


def lone_row_tile(num_rows: int, weight: torch.Tensor) -> GemvTile | None:
    """The tile for FP8 weights and a single row of any dtype; None where the other products take it."""
    if not on_gpu(weight) or num_rows != 1 or is_invariant() or GEMV_TILE is None:
        return None
    return GEMV_TILE if GEMV_TILE.takes(weight.shape[1]) else None


def one_scale_is_faster(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether cuBLASLt multiplies so many FP8 rows, and has better kernels if all have one scale, as the outputs do."""
    if not on_gpu(weight) or _skinny_tile(num_rows, weight) is not None:
        return False
    return num_rows <= _most_one_scale_rows(weight)


def _most_one_scale_rows(weight: torch.Tensor) -> int:
    return next(rows for outputs, rows in ONE_SCALE_ROWS if weight.shape[0] <= outputs)


def fp8_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Plain-torch ``fp8_linear``: the product in float32, scaled afterwards."""
    product = F.linear(x.float(), weight.float())
    scale = w_scale if x_scale is None else x_scale.reshape(-1, 1) * w_scale
    return (product * scale).to(out_dtype)


def fp8_linear_cublas(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    one_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``fp8_linear`` through torch's scaled product: one scale, or a scale a row and one a column (bf16 out only)."""
    if one_scale is not None and x.shape[0] <= _most_one_scale_rows(weight):
        w_scale, row_scale = _ones(1, x.device), one_scale.reshape(1, 1)
    elif x_scale is None:
        row_scale = _ones(power_of_two_at_least(x.shape[0], 1024), x.device)[: x.shape[0]]
    else:
        row_scale = x_scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    out = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=row_scale,
        scale_b=w_scale.reshape(1, -1),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(out_dtype)


@functools.cache
def _ones(rows: int, device: torch.device) -> torch.Tensor:
    """The scales ``[rows, 1]`` of rows that need none; kept, because filling them is a launch."""
    return torch.ones((rows, 1), dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=("num_rows",))
def _skinny_kernel(
    x_desc,
    w_desc,
    w_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    x_scale_ptr,
    w_scale_ptr,
    num_rows,
    num_outputs,
    depth,
    FP8: tl.constexpr,
    X_SCALES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The last program of a tile to arrive adds the partial sums in a fixed order: deterministic.
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    tile_m = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(depth, DEPTH), SPLIT_K)
    first = split * steps * DEPTH
    last = tl.minimum(first + steps * DEPTH, depth)
    prefetch_rows(w_ptr + first, tile_n * OUTPUTS, num_outputs, depth, OUTPUTS, PREFETCH, OVERLAP)
    outputs = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    if FP8:
        w_scale = tl.load(w_scale_ptr + outputs, mask=outputs < num_outputs, other=0.0)
    wait_for_inputs(OVERLAP)
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in tl.range(first, last, DEPTH):
        x = x_desc.load([tile_m * ROWS, k])
        w = w_desc.load([tile_n * OUTPUTS, k])
        acc = tl.dot(w, x.T, acc)
    rows = tile_m * ROWS + tl.arange(0, ROWS)
    mask = (outputs[:, None] < num_outputs) & (rows[None, :] < num_rows)
    slots = rows[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    is_last = True
    if SPLIT_K > 1:
        plane = num_outputs.to(tl.int64) * num_rows  # num_rows 1 is a constant without .to
        arrivals = arrivals_ptr + tile_m * tl.num_programs(0) + tile_n
        tl.store(partial_ptr + split * plane + slots, acc, mask=mask)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for part in tl.static_range(SPLIT_K):
                acc += tl.load(partial_ptr + part * plane + slots, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrivals, 0)
    if is_last:
        if FP8:
            acc = acc * w_scale[:, None]
            if X_SCALES == 2:  # one a row
                acc = acc * tl.load(x_scale_ptr + rows, mask=rows < num_rows, other=0.0)[None, :]
            elif X_SCALES == 1:
                acc = acc * tl.load(x_scale_ptr)
        tl.store(out_ptr + slots, acc.to(out_ptr.dtype.element_ty), mask=mask)


def skinny_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: SkinnyTile,
) -> torch.Tensor:
    """Launch the few-rows product; scales are for FP8 operands only. K must make rows 16-byte multiples."""
    num_rows, depth = x.shape
    num_outputs = weight.shape[0]
    rows = tile.rows or min(128, power_of_two_at_least(num_rows, 16))
    tiles = (ceil_div(num_outputs, tile.outputs), ceil_div(num_rows, rows))
    split_k = _split_k(
        tiles[0] * tiles[1], ceil_div(depth, tile.depth), tile.programs_per_sm * num_sms(x.device)
    )
    out = torch.empty((num_rows, num_outputs), dtype=out_dtype, device=x.device)
    partial, arrivals = None, None
    if split_k > 1:
        partial = torch.empty((split_k, num_rows, num_outputs), dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(x.device)
    _skinny_kernel[(tiles[0], split_k, tiles[1])](
        TensorDescriptor.from_tensor(x.contiguous(), [rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.outputs, tile.depth]),
        weight,
        out,
        partial,
        arrivals,
        x_scale,
        w_scale,
        num_rows,
        num_outputs,
        depth,
        FP8=w_scale is not None,
        X_SCALES=0 if x_scale is None else 1 + (x_scale.numel() > 1),
        SPLIT_K=split_k,
        ROWS=rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        PREFETCH=_prefetch(tile, depth, split_k) if w_scale is not None else 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap_options(x.device, num_rows),
    )
    return out


def _skinny_tile(num_rows: int, weight: torch.Tensor) -> SkinnyTile | None:
    """The table's entry for this many rows, or None where cuBLASLt is the choice."""
    if not on_gpu(weight) or (weight.shape[1] * weight.element_size()) % 16:
        return None
    if is_invariant():
        return INVARIANT_TILES.get(weight.dtype)
    for most_rows, tile in SKINNY_TILES.get(weight.dtype, ()):
        if num_rows <= most_rows:
            return tile
    return None


def _split_k(tiles: int, steps: int, wanted: int) -> int:
    """Parts of the depth: enough programs to fill the GPU, never a part without work."""
    split = max(1, min(wanted // tiles, steps, MAX_SPLIT_K))
    return ceil_div(steps, ceil_div(steps, split))


def _prefetch(tile: SkinnyTile, depth: int, split_k: int) -> int:
    """The tile's ``prefetch``, or less where the last part of the depth is shorter: rows end where memory may."""
    steps = ceil_div(ceil_div(depth, tile.depth), split_k)
    most = depth - (split_k - 1) * steps * tile.depth
    bytes_a_row = min(tile.prefetch, 1 << (most.bit_length() - 1))
    return bytes_a_row if bytes_a_row >= 64 else 0


def _aot_spec(fp8: bool, rows: int, split_k: int, tile: SkinnyTile):
    kind = "fp8e4nv" if fp8 else "bf16"
    signature = {
        "x_desc": f"tensordesc<{kind}[{rows}, {tile.depth}]>",
        "w_desc": f"tensordesc<{kind}[{tile.outputs}, {tile.depth}]>",
        "w_ptr": f"*{kind}",
        "out_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "arrivals_ptr": "*i32",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "num_rows": "i32",
        "num_outputs": "i32",
        "depth": "i32",
    }
    constants = {
        "FP8": fp8,
        "X_SCALES": int(fp8),
        "SPLIT_K": split_k,
        "ROWS": rows,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "PREFETCH": tile.prefetch,
        "OVERLAP": rows == 16,
    }
    return _skinny_kernel, signature, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


AOT_SPECS = [
    _aot_spec(True, 16, 4, SKINNY_TILES[torch.float8_e4m3fn][0][1]),
    _aot_spec(True, 16, 2, SkinnyTile(64, 256, 5, 4, 2, prefetch=1024)),
    _aot_spec(False, 16, 1, SKINNY_TILES[torch.bfloat16][0][1]),
    *(_aot_spec(t == torch.float8_e4m3fn, tile.rows, 1, tile) for t, tile in INVARIANT_TILES.items()),
]
