"""Grouped products with repacked NVFP4 weights on Hopper: decoded to e4m3 in registers, straight into wgmma.

Called by ``moe_nvfp4`` on weights that ``nvfp4_repack`` reordered. Weight rows are the tensor core's M side and come
from registers, the rows of activations its N side from shared memory; a weight byte crosses memory, shared memory
and registers once. Written in Gluon because the register layout of the weights is the point. Needs wgmma (sm_90).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from outrider.kernels._dispatch import ceil_div
from outrider.kernels.moe_dispatch import SortedRows
from outrider.kernels.moe_gemm import max_tiles
from outrider.kernels.nvfp4_repack import CHUNK, TILE_ROWS
from outrider.kernels.nvfp4_stream_kernels import _add_splits_kernel, _stream_kernel
from outrider.kernels.ragged import ragged_descriptor


@dataclass(frozen=True)
class StreamTile:
    """Launch constants: activation rows of a narrow and of a wide tile, warps (16 weight rows each), stages of half
    a chunk each.

    An expert's rows are cut into wide tiles; one with no more rows than a narrow tile runs as such.
    ``programs``: how many must fit a multiprocessor, a bound on registers. ``split_k``: parts of the depth.
    """

    narrow: int
    wide: int
    warps: int
    stages: int
    programs: int
    split_k: int = 1

    @property
    def narrow_stages(self) -> int:
        """Stages of a narrow tile in a wide one's shared memory: 256 bytes a row beside 128 a weight row."""
        wide, narrow = (256 * rows + 128 * 16 * self.warps for rows in (self.wide, self.narrow))
        return self.stages * wide // narrow


_X_LAYOUT = gl.NVMMASharedLayout(128, 8, 5)
_W_LAYOUT = gl.NVMMASharedLayout(0, 32, 5)
_S_LAYOUT = gl.NVMMASharedLayout(0, 8, 3)


def _descriptors(rows: SortedRows, packed: torch.Tensor, block_scale: torch.Tensor, tile: StreamTile):
    """What the copy engine reads, and its boxes: a wide and a narrow stage's activations, words, a chunk's scales.

    Activations as [K/128, rows, 128]; words i32 as [tiles, h and r8 of each chunk, cp, 2, 256] in the names of
    ``nvfp4_repack``, so that a box takes half a chunk; scales u8 as [tiles, K/64, 256], 8 rows a chunk.
    """
    num_experts, num_outputs, half_depth = packed.shape
    num_tiles, tiles = num_experts * num_outputs // TILE_ROWS, tile.warps // 4
    x = rows.x.unflatten(1, (-1, 128)).transpose(0, 1)
    words = packed.view(torch.int32).view(num_tiles, half_depth // 64, 2, 2, 256)
    scales = block_scale.view(torch.uint8).view(num_tiles, half_depth // 32, 256)
    return (
        ragged_descriptor(x, 1, [2, tile.wide, 128], _X_LAYOUT),
        ragged_descriptor(x, 1, [2, tile.narrow, 128], _X_LAYOUT),
        TensorDescriptor.from_tensor(words, [tiles, 4, 1, 2, 256], _W_LAYOUT),
        TensorDescriptor.from_tensor(scales, [tiles, 8, 256], _S_LAYOUT),
    )


def stream_triton(
    rows: SortedRows,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    out: torch.Tensor,
    tile: StreamTile,
    gated: bool,
) -> None:
    """Products of grouped rows (e4m3 in stream order, a scale a row) with repacked weights [E, N, K/2].

    ``gated``: ``silu(gate) · up`` goes to ``out`` [rows, N/2] in grouped order; else row r goes to
    ``out[index[r]]``, [T · k, N], and ``split_k`` may divide the depth.
    """
    num_experts, num_outputs, half_depth = packed.shape
    tiles = max_tiles(rows.num_rows, num_experts, tile.wide) * (num_outputs // (16 * tile.warps))
    target = out
    if tile.split_k > 1:
        target = torch.empty(
            (tile.split_k, rows.num_rows, num_outputs), dtype=torch.float32, device=out.device
        )
    _stream_kernel[(tiles, tile.split_k)](
        *_descriptors(rows, packed, block_scale, tile),
        target,
        rows.offsets,
        rows.index,
        rows.scale,
        global_scale,
        rows.num_rows,
        num_outputs,
        2 * half_depth,
        GATED=gated,
        SPLIT_K=tile.split_k,
        EXPERTS=num_experts,
        CHUNK=CHUNK,
        STAGES=tile.stages,
        NARROW_STAGES=tile.narrow_stages,
        num_warps=tile.warps,
        maxnreg=_max_registers(tile),
    )
    if tile.split_k > 1:
        block = 1024
        _add_splits_kernel[(rows.num_rows, ceil_div(num_outputs, block))](
            target,
            out,
            rows.offsets,
            rows.index,
            rows.scale,
            global_scale,
            rows.num_rows,
            num_outputs,
            EXPERTS=num_experts,
            SPLIT_K=tile.split_k,
            BLOCK=block,
        )


def _max_registers(tile: StreamTile) -> int:
    """Registers of a thread that let ``tile.programs`` share a multiprocessor's 65,536; at most 255."""
    return min(255, 65536 // (32 * tile.warps * tile.programs) // 8 * 8)


def _aot_spec(tile: StreamTile, gated: bool):
    tiles = tile.warps // 4
    signature = {
        "wide_desc": f"tensordesc<fp8e4nv[1,1,2,{tile.wide},128],{_X_LAYOUT!r}>",
        "narrow_desc": f"tensordesc<fp8e4nv[1,1,2,{tile.narrow},128],{_X_LAYOUT!r}>",
        "w_desc": f"tensordesc<i32[{tiles},4,1,2,256],{_W_LAYOUT!r}>",
        "s_desc": f"tensordesc<u8[{tiles},8,256],{_S_LAYOUT!r}>",
    }
    pointers = {"offsets_ptr": "*i32", "index_ptr": "*i32"}
    pointers |= {"x_scale_ptr": "*fp32", "global_scale_ptr": "*fp32"}
    pointers["out_ptr"] = "*bf16" if tile.split_k == 1 else "*fp32"
    numbers = dict.fromkeys(("num_rows", "num_outputs", "depth"), "i32")
    constants = {"GATED": gated, "SPLIT_K": tile.split_k, "EXPERTS": 16, "CHUNK": CHUNK}
    constants |= {"STAGES": tile.stages, "NARROW_STAGES": tile.narrow_stages, "num_warps": tile.warps}
    options = {"num_warps": tile.warps, "maxnreg": _max_registers(tile)}
    aligned = (*pointers, "num_outputs", "depth")  # as a launch finds them
    return _stream_kernel, signature | pointers | numbers, constants, options, aligned


AOT_SPECS = [
    (
        _add_splits_kernel,
        dict.fromkeys(("partial_ptr", "x_scale_ptr", "global_scale_ptr"), "*fp32")
        | {"out_ptr": "*bf16", "offsets_ptr": "*i32", "index_ptr": "*i32"}
        | {"num_rows": "i32", "num_outputs": "i32"},
        {"EXPERTS": 16, "SPLIT_K": 4, "BLOCK": 1024},
    ),
]
HOPPER_AOT_SPECS = [
    _aot_spec(StreamTile(16, 16, 4, 3, 4), gated=True),
    _aot_spec(StreamTile(16, 16, 4, 3, 4, split_k=4), gated=False),
    _aot_spec(StreamTile(16, 16, 4, 4, 4), gated=True),
    _aot_spec(StreamTile(16, 32, 8, 4, 2), gated=False),
    _aot_spec(StreamTile(32, 64, 8, 3, 2), gated=True),
    _aot_spec(StreamTile(64, 128, 8, 4, 1), gated=False),
]
"""Compiled for sm_90 only: the instruction does not exist elsewhere."""
