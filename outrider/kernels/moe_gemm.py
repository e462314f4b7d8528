"""The two grouped matrix products of an expert MLP, for bf16 and FP8 weights.

Called by the launchers of ``moe`` on rows that ``moe_dispatch`` grouped by expert. One pair of kernels serves
decode and prefill: with few rows an expert the weight rows are the tensor core's M side (``SWAP``) and the step
streams weights; with many the rows are. Tiles run expert by expert, row blocks innermost, so a weight tile is
read from memory once. Grids are fixed by shapes; programs without a tile leave at once (CUDA-graph safe).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import arrival_counters, ceil_div, num_sms, power_of_two_at_least
from outrider.kernels.activation import swiglu_rounded
from outrider.kernels.moe_dispatch import SortedRows
from outrider.kernels.quantize import to_fp8


@dataclass(frozen=True)
class Tile:
    """Launch constants of one grouped product: rows x outputs x depth of a tile, and how it is run."""

    rows: int
    outputs: int
    depth: int
    swap: bool
    stages: int
    warps: int
    split_k: int = 1
    programs_per_sm: int = 0
    """0: one program a tile; n: a persistent grid of n programs a multiprocessor."""


@triton.jit
def find_tile(offsets_ptr, tile, num_experts, tiles_n, ROWS: tl.constexpr, BINS: tl.constexpr):
    """``(expert, first row, end row, output tile)`` of a tile number; expert-major, row blocks innermost."""
    bins = tl.arange(0, BINS)
    mask = bins < num_experts
    starts = tl.load(offsets_ptr + bins, mask=mask, other=0)
    ends = tl.load(offsets_ptr + bins + 1, mask=mask, other=0)
    blocks = (ends - starts + ROWS - 1) // ROWS
    last = tl.cumsum(blocks, 0) * tiles_n
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = bins == expert
    num_blocks = tl.maximum(tl.sum(tl.where(mine, blocks, 0), 0), 1)
    local = tile - tl.sum(tl.where(mine, last - blocks * tiles_n, 0), 0)
    row = tl.sum(tl.where(mine, starts, 0), 0) + (local % num_blocks) * ROWS
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return expert, row, end, local // num_blocks


@triton.jit
def _count_tiles(offsets_ptr, num_experts, tiles_n, ROWS: tl.constexpr, BINS: tl.constexpr):
    bins = tl.arange(0, BINS)
    mask = bins < num_experts
    counts = tl.load(offsets_ptr + bins + 1, mask=mask, other=0) - tl.load(
        offsets_ptr + bins, mask=mask, other=0
    )
    return tl.sum((counts + ROWS - 1) // ROWS, 0) * tiles_n


@triton.jit
def _gate_up_kernel(
    x_desc,
    w_desc,
    out_ptr,
    offsets_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    num_experts,
    inter,
    depth,
    SWAP: tl.constexpr,
    FP8: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    MODEL_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BINS: tl.constexpr,
):
    # A tile keeps the gate and the up product of the same columns, so SwiGLU needs no second pass.
    tiles_n = tl.cdiv(inter, OUTPUTS)
    total = _count_tiles(offsets_ptr, num_experts, tiles_n, ROWS, BINS)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, tile_n = find_tile(offsets_ptr, tile, num_experts, tiles_n, ROWS, BINS)
        gate_row = expert * 2 * inter + tile_n * OUTPUTS
        up_row = gate_row + inter
        gate = tl.zeros((OUTPUTS if SWAP else ROWS, ROWS if SWAP else OUTPUTS), tl.float32)
        up = tl.zeros((OUTPUTS if SWAP else ROWS, ROWS if SWAP else OUTPUTS), tl.float32)
        for k in tl.range(0, depth, DEPTH):
            x = x_desc.load([row, k])
            w_gate = w_desc.load([gate_row, k])
            w_up = w_desc.load([up_row, k])
            if SWAP:
                gate = tl.dot(w_gate, x.T, gate)
                up = tl.dot(w_up, x.T, up)
            else:
                gate = tl.dot(x, w_gate.T, gate)
                up = tl.dot(x, w_up.T, up)
        if SWAP:
            gate = tl.trans(gate)
            up = tl.trans(up)
        rows = row + tl.arange(0, ROWS)
        columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
        if FP8:
            if X_SCALE_STRIDE:
                scale = tl.load(x_scale_ptr + rows, mask=rows < end, other=0.0) * tl.load(
                    w_scale_ptr + expert
                )
                gate = gate * scale[:, None]
                up = up * scale[:, None]
            else:
                scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
                gate = gate * scale
                up = up * scale
        out = swiglu_rounded(gate, up, MODEL_DTYPE)
        out_ptrs = out_ptr + rows[:, None].to(tl.int64) * inter + columns[None, :]
        mask = (rows[:, None] < end) & (columns[None, :] < inter)
        if QUANTIZE:
            tl.store(out_ptrs, to_fp8(out.to(tl.float32), tl.load(out_scale_ptr)), mask=mask)
        else:
            tl.store(out_ptrs, out, mask=mask)


@triton.jit(do_not_specialize=("num_rows",))
def _down_kernel(
    x_desc,
    w_desc,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    offsets_ptr,
    index_ptr,
    x_scale_ptr,
    w_scale_ptr,
    num_experts,
    hidden,
    depth,
    num_rows,
    SWAP: tl.constexpr,
    FP8: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BINS: tl.constexpr,
):
    # Rows return to their (token, choice) place. With SPLIT_K the last program of a tile to arrive adds the
    # partial sums in a fixed order, so the result does not depend on who was last.
    tiles_n = tl.cdiv(hidden, OUTPUTS)
    total = _count_tiles(offsets_ptr, num_experts, tiles_n, ROWS, BINS) * SPLIT_K
    for unit in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        tile = unit // SPLIT_K
        split = unit % SPLIT_K
        expert, row, end, tile_n = find_tile(offsets_ptr, tile, num_experts, tiles_n, ROWS, BINS)
        w_row = expert * hidden + tile_n * OUTPUTS
        steps = tl.cdiv(tl.cdiv(depth, DEPTH), SPLIT_K)
        first = split * steps * DEPTH
        last = tl.minimum(first + steps * DEPTH, depth)
        acc = tl.zeros((OUTPUTS if SWAP else ROWS, ROWS if SWAP else OUTPUTS), tl.float32)
        for k in tl.range(first, last, DEPTH):
            x = x_desc.load([row, k])
            w = w_desc.load([w_row, k])
            acc = tl.dot(w, x.T, acc) if SWAP else tl.dot(x, w.T, acc)
        if SWAP:
            acc = tl.trans(acc)
        rows = row + tl.arange(0, ROWS)
        columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
        mask = (rows[:, None] < end) & (columns[None, :] < hidden)
        is_last = True
        if SPLIT_K > 1:
            slots = rows[:, None].to(tl.int64) * hidden + columns[None, :]
            plane = hidden.to(tl.int64) * num_rows  # num_rows 1 is a constant without .to
            tl.store(partial_ptr + split * plane + slots, acc, mask=mask)
            tl.debug_barrier()
            is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
            if is_last:
                acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
                for part in tl.static_range(SPLIT_K):
                    acc += tl.load(
                        partial_ptr + part * plane + slots, mask=mask, other=0.0, cache_modifier=".cg"
                    )
                tl.store(arrivals_ptr + tile, 0)
        if is_last:
            if FP8:
                if X_SCALE_STRIDE:
                    scale = tl.load(x_scale_ptr + rows, mask=rows < end, other=0.0)
                    acc = acc * (scale * tl.load(w_scale_ptr + expert))[:, None]
                else:
                    acc = acc * (tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert))
            places = tl.load(index_ptr + rows, mask=rows < end, other=0)
            out_ptrs = out_ptr + places[:, None].to(tl.int64) * hidden + columns[None, :]
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gate_up_triton(
    rows: SortedRows,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    model_dtype: torch.dtype,
    tile: Tile,
) -> SortedRows:
    """``silu(x · gateᵀ) · (x · upᵀ)`` of the grouped rows; e4m3 if ``out_scale`` is given, else the model dtype."""
    num_experts, double_inter, depth = w13.shape
    inter = double_inter // 2
    dtype = model_dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty((rows.x.shape[0], inter), dtype=dtype, device=w13.device)
    units = max_tiles(rows.num_rows, num_experts, tile.rows) * ceil_div(inter, tile.outputs)
    programs = _num_programs(units, tile, w13.device)
    _gate_up_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows.x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w13.view(-1, depth), [tile.outputs, tile.depth]),
        out,
        rows.offsets,
        rows.scale,
        w13_scale,
        out_scale,
        num_experts,
        inter,
        depth,
        SWAP=tile.swap,
        FP8=w13_scale is not None,
        X_SCALE_STRIDE=int(rows.scale is not None and rows.scale.numel() > 1),
        QUANTIZE=out_scale is not None,
        MODEL_DTYPE=TRITON_DTYPES[model_dtype],
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        BINS=power_of_two_at_least(num_experts, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return SortedRows(out, rows.index, rows.offsets, out_scale, rows.num_rows)


def down_triton(
    rows: SortedRows,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
) -> None:
    """``x · w2ᵀ`` of the grouped rows, written to row ``index[r]`` of ``out`` [tokens · k, M]."""
    num_experts, hidden, depth = w2.shape
    units = max_tiles(rows.num_rows, num_experts, tile.rows) * ceil_div(hidden, tile.outputs) * tile.split_k
    programs = _num_programs(units, tile, w2.device)
    split = tile.split_k > 1
    partial = None
    if split:
        partial = torch.empty((tile.split_k, rows.num_rows, hidden), dtype=torch.float32, device=w2.device)
    _down_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows.x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w2.view(-1, depth), [tile.outputs, tile.depth]),
        out,
        partial,
        arrival_counters(w2.device) if split else None,
        rows.offsets,
        rows.index,
        rows.scale,
        w2_scale,
        num_experts,
        hidden,
        depth,
        rows.num_rows,
        SWAP=tile.swap,
        FP8=w2_scale is not None,
        X_SCALE_STRIDE=int(rows.scale is not None and rows.scale.numel() > 1),
        SPLIT_K=tile.split_k,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        BINS=power_of_two_at_least(num_experts, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Most row blocks any routing can make: full blocks, plus one ragged block for every expert with rows."""
    return min(num_rows, num_rows // tile_rows + min(num_experts, num_rows))


def _num_programs(units: int, tile: Tile, device: torch.device) -> int:
    return min(units, tile.programs_per_sm * num_sms(device)) if tile.programs_per_sm else units


TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _aot_spec(kernel, fp8: bool, tile: Tile):
    """A (kernel, signature, constants, options) entry for compiling without a GPU."""
    kind = "fp8e4nv" if fp8 else "bf16"
    scales = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    signature = {
        "x_desc": f"tensordesc<{kind}[{tile.rows}, {tile.depth}]>",
        "w_desc": f"tensordesc<{kind}[{tile.outputs}, {tile.depth}]>",
        "out_ptr": "*" + (kind if kernel is _gate_up_kernel else "bf16"),
        "offsets_ptr": "*i32",
        **scales,
        "num_experts": "i32",
        "depth": "i32",
    }
    constants = {
        "SWAP": tile.swap,
        "FP8": fp8,
        "X_SCALE_STRIDE": 0,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "BINS": 16,
    }
    if kernel is _gate_up_kernel:
        signature |= {"out_scale_ptr": "*fp32", "inter": "i32"}
        constants |= {"QUANTIZE": fp8, "MODEL_DTYPE": tl.bfloat16}
    else:
        signature |= {"partial_ptr": "*fp32", "arrivals_ptr": "*i32", "index_ptr": "*i32"}
        signature |= {"hidden": "i32", "num_rows": "i32"}
        constants |= {"SPLIT_K": tile.split_k}
    return kernel, signature, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


AOT_SPECS = [
    _aot_spec(_gate_up_kernel, True, Tile(16, 64, 128, True, 4, 4)),
    _aot_spec(_gate_up_kernel, True, Tile(128, 128, 128, False, 3, 8)),
    _aot_spec(_gate_up_kernel, False, Tile(32, 64, 64, True, 4, 4)),
    _aot_spec(_down_kernel, True, Tile(16, 64, 256, True, 4, 4, split_k=4)),
    _aot_spec(_down_kernel, True, Tile(128, 256, 128, False, 3, 8, programs_per_sm=1)),
]
