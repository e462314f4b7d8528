"""Products with NVFP4 weights decoded inside the kernel, dense or grouped by expert, gated or plain.

Called by ``nvfp4`` and ``moe``. Weight rows are the tensor core's M side and come from registers, so packed bytes
cross memory once; activations come as planes (``to_planes_triton``). Two arithmetics: bf16 (exact weights) and
e4m3 (weights rounded after block scaling, activations with a scale a row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import (
    arrival_counters,
    ceil_div,
    interpreted,
    power_of_two_at_least,
)
from outrider.kernels.moe_dispatch import ROW_PADDING
from outrider.kernels.moe_gemm import find_tile, max_tiles
from outrider.kernels.nvfp4_decode import (
    decode_bf16,
    decode_fp8,
    decode_plane_plainly,
)
from outrider.kernels.quantize import MIN_ROW_SCALE, to_fp8


@dataclass(frozen=True)
class Nvfp4Tile:
    """Launch constants: activation rows, weight rows and scale blocks (of 16) of a tile, and how it is run."""

    rows: int
    outputs: int
    blocks: int
    stages: int
    warps: int
    split_k: int = 1


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert, and where each row's result goes (see ``SortedRows``)."""

    offsets: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Planes:
    """Activations plane by plane: [rows + padding, depth rounded up], bf16 or e4m3 with ``scale`` f32 [rows]."""

    x: torch.Tensor
    scale: torch.Tensor | None
    num_rows: int
    blocks: int


@triton.jit
def _to_planes_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    depth,
    padded_depth,
    QUANTIZE: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    PLANE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    chunk: tl.constexpr = 16 * PLANE_BLOCKS
    source = place // chunk * chunk + place % PLANE_BLOCKS * 16 + place % chunk // PLANE_BLOCKS
    x = tl.load(x_ptr + row * depth + source, mask=source < depth, other=0.0)
    out_ptrs = out_ptr + row * padded_depth + place
    if QUANTIZE:
        x = x.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), 0) / 448.0, MIN_SCALE)
        tl.store(scale_ptr + row, scale)
        tl.store(out_ptrs, to_fp8(x, scale), mask=place < padded_depth)
    else:
        tl.store(out_ptrs, x, mask=place < padded_depth)


@triton.jit
def _load_blocks(w_ptr, s_ptr, rows, blocks, num_rows, num_blocks, EVEN: tl.constexpr):
    offsets = rows[:, None].to(tl.int64) * num_blocks + blocks[None, :]
    if EVEN:
        return tl.load(w_ptr + offsets), tl.load(s_ptr + offsets)
    mask = (rows[:, None] < num_rows) & (blocks[None, :] < num_blocks)
    return tl.load(w_ptr + offsets, mask=mask, other=0), tl.load(s_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _decode(words, scales, FP8: tl.constexpr):
    return decode_fp8(words, scales) if FP8 else decode_bf16(words, scales)


@triton.jit(do_not_specialize=("num_rows",))
def _nvfp4_kernel(
    x_desc,
    w_ptr,
    s_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    offsets_ptr,
    index_ptr,
    x_scale_ptr,
    global_scale_ptr,
    num_rows,
    num_experts,
    num_outputs,
    num_blocks,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):
    # num_outputs counts gate rows only when GATED; the up rows follow them.
    tiles_n = tl.cdiv(num_outputs, OUTPUTS)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if GROUPED:
        expert, row, end, tile_n = find_tile(offsets_ptr, tile, num_experts, tiles_n, ROWS, BINS)
        if expert >= num_experts:
            return
    else:
        row_blocks = tl.cdiv(num_rows, ROWS)
        expert = 0
        row = tile % row_blocks * ROWS
        end = num_rows
        tile_n = tile // row_blocks
    steps = tl.cdiv(tl.cdiv(num_blocks, BLOCKS), SPLIT_K)
    first = split * steps * BLOCKS
    last = tl.minimum(first + steps * BLOCKS, num_blocks)
    columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    w_rows = expert * num_outputs * (2 if GATED else 1) + columns
    weight_rows = num_experts * num_outputs * (2 if GATED else 1)
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    up = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for block in tl.range(first, last, BLOCKS):
        blocks = block + tl.arange(0, BLOCKS)
        words, scales = _load_blocks(w_ptr, s_ptr, w_rows, blocks, weight_rows, num_blocks, EVEN)
        if GATED:
            up_words, up_scales = _load_blocks(
                w_ptr, s_ptr, w_rows + num_outputs, blocks, weight_rows, num_blocks, EVEN
            )
        if ASM:
            planes = _decode(words, scales, FP8)
            if GATED:
                up_planes = _decode(up_words, up_scales, FP8)
        for p in tl.static_range(16):
            x = x_desc.load([row, block * 16 + p * BLOCKS])
            if ASM:
                acc = tl.dot(planes[p], x.T, acc)
                if GATED:
                    up = tl.dot(up_planes[p], x.T, up)
            else:
                plane = decode_plane_plainly(words, scales, p, 3 if FP8 else 8)
                acc = tl.dot(plane.to(x.dtype), x.T, acc)
                if GATED:
                    plane = decode_plane_plainly(up_words, up_scales, p, 3 if FP8 else 8)
                    up = tl.dot(plane.to(x.dtype), x.T, up)
    rows = row + tl.arange(0, ROWS)
    mask = (columns[:, None] < num_outputs) & (rows[None, :] < end)
    is_last = True
    if SPLIT_K > 1:
        slots = rows[None, :].to(tl.int64) * num_outputs + columns[:, None]
        plane = num_outputs.to(tl.int64) * num_rows  # num_rows 1 is a constant without .to
        tl.store(partial_ptr + split * plane + slots, acc, mask=mask)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for part in tl.static_range(SPLIT_K):
                acc += tl.load(partial_ptr + part * plane + slots, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
    if is_last:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        scale = tl.load(global_scale_ptr) * (8.0 if FP8 else 256.0)
        if FP8:
            scale = (scale * tl.load(x_scale_ptr + rows, mask=rows < end, other=0.0))[None, :]
        acc = acc * scale
        if GATED:
            gate = acc.to(dtype).to(tl.float32)
            acc = gate * tl.sigmoid(gate) * (up * scale).to(dtype).to(tl.float32)
        places = tl.load(index_ptr + rows, mask=rows < end, other=0) if GROUPED and not GATED else rows
        out_ptrs = out_ptr + places[None, :].to(tl.int64) * num_outputs + columns[:, None]
        tl.store(out_ptrs, acc.to(dtype), mask=mask)


@triton.jit
def _dequantize_kernel(
    w_ptr,
    s_ptr,
    global_scale_ptr,
    out_ptr,
    num_words,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    words_at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = words_at < num_words
    words = tl.load(w_ptr + words_at, mask=mask, other=0)
    scales = tl.load(s_ptr + words_at, mask=mask, other=0.0)
    out_ptrs = out_ptr + words_at * 16
    if ASM:
        planes = _decode(words, scales, FP8)
    for p in tl.static_range(16):
        plane = planes[p] if ASM else decode_plane_plainly(words, scales, p, 3 if FP8 else 8)
        if not FP8:
            plane = plane.to(tl.float32) * (tl.load(global_scale_ptr) * 256.0)
        tl.store(out_ptrs + p, plane.to(out_ptr.dtype.element_ty), mask=mask)


def to_planes_triton(x: torch.Tensor, num_rows: int, plane_blocks: int, fp8: bool) -> Planes:
    """The first ``num_rows`` rows of ``x`` [.., K] as planes; e4m3 with a scale a row if ``fp8``."""
    depth = x.shape[1]
    padded = ceil_div(depth, 16 * plane_blocks) * 16 * plane_blocks
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    out = torch.empty((num_rows + ROW_PADDING, padded), dtype=dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device) if fp8 else None
    _to_planes_kernel[(num_rows,)](
        x.contiguous(),
        out,
        scale,
        depth,
        padded,
        QUANTIZE=fp8,
        MIN_SCALE=MIN_ROW_SCALE,
        PLANE_BLOCKS=plane_blocks,
        BLOCK=power_of_two_at_least(padded, 128),
        num_warps=8,
    )
    return Planes(out, scale, num_rows, plane_blocks)


def nvfp4_gemm_triton(
    planes: Planes,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    out: torch.Tensor,
    tile: Nvfp4Tile,
    groups: Groups | None = None,
    gated: bool = False,
) -> None:
    """Write ``planes · Wᵀ`` to ``out``; ``packed`` u8 [N, K/2], or [E, N, K/2] with ``groups``.

    ``gated``: N is gate rows then up rows, and ``silu(gate) · up`` is written in grouped order; else a grouped
    row r goes to ``out[index[r]]``.
    """
    num_experts = packed.shape[0] if groups else 1
    num_outputs, num_blocks = packed.shape[-2] // (2 if gated else 1), packed.shape[-1] // 8
    num_rows = planes.num_rows
    blocks = max_tiles(num_rows, num_experts, tile.rows) if groups else ceil_div(num_rows, tile.rows)
    tiles = blocks * ceil_div(num_outputs, tile.outputs)
    partial, arrivals = None, None
    if tile.split_k > 1:
        partial = torch.empty((tile.split_k, num_rows, num_outputs), dtype=torch.float32, device=out.device)
        arrivals = arrival_counters(out.device)
    _nvfp4_kernel[(tiles, tile.split_k)](
        TensorDescriptor.from_tensor(planes.x, [tile.rows, tile.blocks]),
        packed.view(torch.int64),
        block_scale,
        out,
        partial,
        arrivals,
        groups.offsets if groups else None,
        groups.index if groups else None,
        planes.scale,
        global_scale,
        num_rows,
        num_experts,
        num_outputs,
        num_blocks,
        GROUPED=groups is not None,
        GATED=gated,
        FP8=planes.scale is not None,
        ASM=not interpreted(),
        EVEN=num_outputs % tile.outputs == 0 and num_blocks % tile.blocks == 0,
        SPLIT_K=tile.split_k,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        BLOCKS=tile.blocks,
        BINS=power_of_two_at_least(num_experts, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def nvfp4_to_fp8_triton(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Weights [..., K] as e4m3 of ``value · block_scale · 2**-FP8_SHIFT``, for a product that runs in FP8."""
    return _dequantize(packed, block_scale, None, torch.float8_e4m3fn)


def dequantize_nvfp4_triton(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [..., K] in ``dtype``, all scales applied."""
    return _dequantize(packed, block_scale, global_scale, dtype)


def _dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device)
    num_words = packed.numel() // 8
    block = 1024
    _dequantize_kernel[(ceil_div(num_words, block),)](
        packed.view(torch.int64),
        block_scale,
        global_scale,
        out,
        num_words,
        FP8=global_scale is None,
        ASM=not interpreted(),
        BLOCK=block,
        num_warps=4,
    )
    return out


def _aot_spec(fp8: bool, gated: bool, tile: Nvfp4Tile):
    kind = "fp8e4nv" if fp8 else "bf16"
    pointers = {
        "w_ptr": "*i64",
        "s_ptr": "*fp8e4nv",
        "out_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "arrivals_ptr": "*i32",
        "offsets_ptr": "*i32",
        "index_ptr": "*i32",
        "x_scale_ptr": "*fp32",
        "global_scale_ptr": "*fp32",
    }
    numbers = dict.fromkeys(("num_rows", "num_experts", "num_outputs", "num_blocks"), "i32")
    signature = {"x_desc": f"tensordesc<{kind}[{tile.rows}, {tile.blocks}]>", **pointers, **numbers}
    constants = {
        "GROUPED": True,
        "GATED": gated,
        "FP8": fp8,
        "ASM": True,
        "EVEN": True,
        "SPLIT_K": tile.split_k,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "BLOCKS": tile.blocks,
        "BINS": 16,
    }
    return _nvfp4_kernel, signature, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


AOT_SPECS = [
    _aot_spec(False, True, Nvfp4Tile(16, 64, 16, 3, 4)),
    _aot_spec(True, False, Nvfp4Tile(32, 128, 32, 3, 4)),
    _aot_spec(True, True, Nvfp4Tile(32, 64, 32, 3, 4)),
    (
        _dequantize_kernel,
        {
            "w_ptr": "*i64",
            "s_ptr": "*fp8e4nv",
            "global_scale_ptr": "*fp32",
            "out_ptr": "*bf16",
            "num_words": "i32",
        },
        {"FP8": False, "ASM": True, "BLOCK": 1024},
    ),
    (
        _to_planes_kernel,
        {
            "x_ptr": "*bf16",
            "out_ptr": "*fp8e4nv",
            "scale_ptr": "*fp32",
            "depth": "i32",
            "padded_depth": "i32",
        },
        {"QUANTIZE": True, "MIN_SCALE": MIN_ROW_SCALE, "PLANE_BLOCKS": 32, "BLOCK": 8192},
    ),
]
