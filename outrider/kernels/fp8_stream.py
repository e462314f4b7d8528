"""Grouped products of e4m3 rows with e4m3 weights on Hopper, for twenty to some hundred rows an expert.

Called by ``moe``, with the bits of ``moe_gemm``. An expert's rows are cut into wide tiles, and the last of them take
a narrow one if they fit, so that weights pass once and few rows are multiplied in vain. Written in Gluon, because the
copies must not stop between two tiles. Needs wgmma (sm_90).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from outrider.kernels._dispatch import ceil_div, num_sms
from outrider.kernels.fp8_stream_kernels import _fp8_stream_kernel
from outrider.kernels.moe_dispatch import SortedRows
from outrider.kernels.moe_gemm import max_tiles


@dataclass(frozen=True)
class StreamTile:
    """Launch constants of a product: activation rows of a narrow and of a wide tile, and weight rows of both.

    A stage is 128 of the depth; ``programs`` share a multiprocessor. A warp group multiplies 64 rows or more, and in
    gate-up by 128 weight rows or more, so that a gate and its up meet in one thread.
    """

    narrow: int
    wide: int
    weights: int
    stages: int
    warps: int = 8
    programs: int = 1


_X_LAYOUT = gl.NVMMASharedLayout(128, 8, 2)
_W_LAYOUT = gl.NVMMASharedLayout(128, 8, 5)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

MAX_STAGES = 8
"""No ring is longer. A product has as many steps or more, so that its ring holds no more than two tiles."""

MAX_EXPERTS = 32
"""A program looks through all experts for its next tile."""


def can_stream(w13: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether these experts' products can run here: on Hopper, in whole blocks, and deep enough for the ring."""
    deep = min(w13.shape[2], w2.shape[2]) >= 128 * MAX_STAGES
    whole = w13.shape[1] % 128 == 0 and w2.shape[1] % 64 == 0 and w2.shape[2] % 16 == 0
    return _has_wgmma(w13.device) and deep and whole and w13.shape[0] <= MAX_EXPERTS


@functools.cache
def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def gate_up_stream(
    rows: SortedRows,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    out_scale: torch.Tensor,
    model_dtype: torch.dtype,
    tile: StreamTile,
) -> SortedRows:
    """``silu(x · gateᵀ) · (x · upᵀ)`` of the grouped rows in e4m3, as ``moe_gemm.gate_up_triton``."""
    out = torch.empty((rows.x.shape[0], w13.shape[1] // 2), dtype=torch.float8_e4m3fn, device=w13.device)
    _launch(rows, w13, w13_scale, out_scale, out, model_dtype, tile, gated=True)
    return SortedRows(out, rows.index, rows.offsets, out_scale, rows.num_rows)


def down_stream(
    rows: SortedRows, w2: torch.Tensor, w2_scale: torch.Tensor, out: torch.Tensor, tile: StreamTile
) -> None:
    """``x · w2ᵀ`` of the grouped rows, written to row ``index[r]`` of ``out`` [tokens · k, M]."""
    _launch(rows, w2, w2_scale, None, out, out.dtype, tile, gated=False)


def _launch(
    rows: SortedRows,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    out_scale: torch.Tensor | None,
    out: torch.Tensor,
    model_dtype: torch.dtype,
    tile: StreamTile,
    gated: bool,
) -> None:
    num_experts, _, depth = weight.shape
    parts = 2 if gated else 1
    blocks = tile.weights // (64 * parts)
    units = max_tiles(rows.num_rows, num_experts, tile.wide) * ceil_div(out.shape[1], 64 * blocks)
    # A box takes the gate and the up rows of the same columns, block by block, so that one thread gets both.
    w_blocks = weight.view(num_experts, parts, -1, 64, depth).transpose(1, 2)
    _fp8_stream_kernel[(min(units, tile.programs * num_sms(weight.device)),)](
        TensorDescriptor.from_tensor(rows.x, [tile.narrow, 128], _X_LAYOUT),
        TensorDescriptor.from_tensor(w_blocks, [1, blocks, parts, 64, 128], _W_LAYOUT),
        out,
        rows.offsets,
        rows.index,
        rows.scale,
        w_scale,
        out_scale,
        out.shape[1],
        depth,
        WIDE=tile.wide,
        MODEL_DTYPE=_DTYPES[model_dtype],
        EXPERTS=num_experts,
        STAGES=tile.stages,
        num_warps=tile.warps,
        maxnreg=_max_registers(tile),
    )


def _max_registers(tile: StreamTile) -> int:
    """Registers of a thread that let ``tile.programs`` share a multiprocessor's 65,536; at most 255."""
    return min(255, 65536 // (32 * tile.warps * tile.programs) // 8 * 8)


def _aot_spec(tile: StreamTile, gated: bool):
    parts = 2 if gated else 1
    signature = {
        "x_desc": f"tensordesc<fp8e4nv[{tile.narrow},128],{_X_LAYOUT!r}>",
        "w_desc": f"tensordesc<fp8e4nv[1,{tile.weights // (64 * parts)},{parts},64,128],{_W_LAYOUT!r}>",
        "out_ptr": "*fp8e4nv" if gated else "*bf16",
    }
    signature |= {"offsets_ptr": "*i32", "index_ptr": "*i32"}
    signature |= dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "out_scale_ptr"), "*fp32")
    signature |= {"num_columns": "i32", "depth": "i32"}
    constants = {"WIDE": tile.wide, "MODEL_DTYPE": gl.bfloat16, "EXPERTS": 16}
    constants |= {"STAGES": tile.stages, "num_warps": tile.warps}
    options = {"num_warps": tile.warps, "maxnreg": _max_registers(tile)}
    aligned = ("out_ptr", "offsets_ptr", "index_ptr", "num_columns", "depth")  # as a launch finds them
    return _fp8_stream_kernel, signature, constants, options, aligned


HOPPER_AOT_SPECS = [
    _aot_spec(StreamTile(64, 128, 256, 4), gated=True),
    _aot_spec(StreamTile(64, 128, 128, 3, 4, 2), gated=True),
    _aot_spec(StreamTile(64, 64, 256, 5), gated=True),
    _aot_spec(StreamTile(64, 128, 128, 6), gated=False),
    _aot_spec(StreamTile(64, 64, 256, 5), gated=False),
]
"""Compiled for sm_90 only: the instruction does not exist elsewhere."""
