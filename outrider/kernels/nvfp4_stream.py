"""Grouped products with repacked NVFP4 weights on Hopper: decoded to e4m3 in registers, straight into wgmma.

Called by ``moe`` on weights that ``nvfp4_repack`` reordered. Weight rows are the tensor core's M side and come
from registers, the rows of activations its N side from shared memory; a weight byte crosses memory, shared memory
and registers once. Written in Gluon because the register layout of the weights is the point. Needs wgmma (sm_90).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from outrider.kernels._dispatch import ceil_div
from outrider.kernels.moe_dispatch import SortedRows
from outrider.kernels.moe_gemm import max_tiles
from outrider.kernels.nvfp4_repack import CHUNK

# Names since, and before, Triton 3.7.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)


@dataclass(frozen=True)
class StreamTile:
    """Launch constants: activation rows of a tile, warps (16 weight rows each), pipeline stages, depth splits.

    ``masked``: rows behind a group's end are zeros instead of whatever follows; saves reading them.
    """

    rows: int
    warps: int
    stages: int
    split_k: int = 1
    masked: bool = False


def _decode_asm(first_block: int) -> str:
    """PTX for two of four blocks: words $8..$11 and their scale bytes $12 -> 8 registers of 4 e4m3 values.

    A scale byte is the e4m3 code c of half the scale, with bit 7 saying whether 1.5 x the scale rounds up: the
    magnitudes' codes are then 0, c, c+8, c+12+up, c+16, c+20+up, c+24, c+28+up, and one byte permute looks up
    four values. Signs wait in bits 7, 15, 23, 31 for the low four values of a word and 3, 11, 19, 27 for the high.
    """
    lines = ["{ .reg .b32 s, u, lo, hi, t, v, a, b;"]
    out = 0
    for block in (first_block, first_block + 1):
        lines += [
            f"prmt.b32 s, $12, 0, {hex(0x1111 * block)};",
            "shr.u32 u, s, 7;",
            "and.b32 hi, s, 0x7F7F7F7F; and.b32 v, u, 0x01000100;",
            "add.u32 hi, hi, v; add.u32 hi, hi, 0x1C181410;",
            "and.b32 lo, s, 0x7F7F7F00; and.b32 v, u, 0x01000000;",
            "add.u32 lo, lo, v; add.u32 lo, lo, 0x0C080000;",
            f"mov.b64 {{a, b}}, ${8 + block};",
        ]
        for word in "ab":
            lines += [
                f"and.b32 t, {word}, 0x77777777;",
                f"prmt.b32 v, lo, hi, t; lop3.b32 ${out}, v, {word}, 0x80808080, 0xF8;",
                f"shr.u32 t, t, 16; shl.b32 u, {word}, 4;",
                f"prmt.b32 v, lo, hi, t; lop3.b32 ${out + 1}, v, u, 0x80808080, 0xF8;",
            ]
            out += 2
    return "\n".join(lines) + "}"


_LOW_ASM = gl.constexpr(_decode_asm(0))
_HIGH_ASM = gl.constexpr(_decode_asm(2))
_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["l"] * 4 + ["r"]))


@gluon.jit
def _operand(p0, p1, p2, p3, layout: gl.constexpr):
    """Four [M, 32] pieces side by side as one [M, 128] register operand."""
    pieces = gl.join(gl.join(p0, p2), gl.join(p1, p3))
    M: gl.constexpr = p0.shape[0]
    return gl.convert_layout(gl.reshape(gl.permute(pieces, (0, 2, 3, 1)), (M, 128)), layout)


@gluon.jit
def _decode_half(words, scales, ASM: gl.constexpr, layout: gl.constexpr):
    """Two [M, 128] operands from half of the blocks of ``words`` int64 [M, 32]."""
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        ASM,
        _CONSTRAINTS,
        [words, scales],
        dtype=(gl.float8e4nv, gl.float8e4nv, gl.float8e4nv, gl.float8e4nv,
               gl.float8e4nv, gl.float8e4nv, gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )  # fmt: skip
    return _operand(p0, p1, p2, p3, layout), _operand(p4, p5, p6, p7, layout)


@gluon.jit
def _find_tile(offsets_ptr, tile, tiles_n, ROWS: gl.constexpr, EXPERTS: gl.constexpr):
    """``(expert or -1, first row, end row, output tile)``; expert-major, row blocks innermost."""
    expert = -1
    row = 0
    end = 0
    tile_n = 0
    done = 0
    for e in gl.static_range(EXPERTS):
        first = gl.load(offsets_ptr + e)
        last = gl.load(offsets_ptr + e + 1)
        blocks = (last - first + ROWS - 1) // ROWS
        local = tile - done
        done += blocks * tiles_n
        if (local >= 0) & (tile < done):
            expert = e
            row = first + local % blocks * ROWS
            end = last
            tile_n = local // blocks
    return expert, row, end, tile_n


@gluon.jit
def _copy_step(
    x_ptrs, x_mask, w_ptrs, s_ptrs, x_smem, w_smem, s_smem, step, limit,
    STAGES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Start copying chunk ``step`` into its stage; an empty group when past the end keeps the count of groups."""
    if step < limit:
        stage = step % STAGES
        _async_load(w_smem.index(stage), w_ptrs + step * (64 * CHUNK // 16))
        _async_load(s_smem.index(stage), s_ptrs + step * (64 * CHUNK // 16))
        _async_load(x_smem.index(stage), x_ptrs + step * CHUNK, x_mask)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=("num_rows",))
def _stream_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    out_ptr,
    offsets_ptr,
    index_ptr,
    x_scale_ptr,
    global_scale_ptr,
    num_rows,
    num_outputs,
    depth,
    GATED: gl.constexpr,
    SPLIT_K: gl.constexpr,
    EXPERTS: gl.constexpr,
    ROWS: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    num_warps: gl.constexpr,
):
    # num_outputs counts stored weight rows: gate and up rows when GATED.
    M: gl.constexpr = 16 * num_warps
    HALVES: gl.constexpr = M // 64
    PARTS: gl.constexpr = CHUNK // 128
    expert, row, end, tile_n = _find_tile(offsets_ptr, gl.program_id(0), num_outputs // M, ROWS, EXPERTS)
    if expert >= 0:
        steps = depth // CHUNK
        split_steps = (steps + SPLIT_K - 1) // SPLIT_K
        first = gl.program_id(1) * split_steps
        limit = gl.minimum(first + split_steps, steps)

        flat: gl.constexpr = gl.BlockedLayout([2], [32], [num_warps], [0])
        flat_bytes: gl.constexpr = gl.BlockedLayout([16], [32], [num_warps], [0])
        rows_of_16: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [num_warps, 1], [1, 0])
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 32])
        operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
        if HALVES == 2:
            word_layout: gl.constexpr = gl.DistributedLinearLayout(
                [[1], [256], [512], [1024]],
                [[2], [4], [8], [16], [32]],
                [[64], [128], [2048]],
                [],
                [M * 32],
            )
            scale_layout: gl.constexpr = gl.DistributedLinearLayout(
                [[1], [2], [4], [8]],
                [[16], [32], [64], [128], [256]],
                [[512], [1024], [2048]],
                [],
                [M * 32],
            )
        else:
            word_layout: gl.constexpr = gl.DistributedLinearLayout(  # type: ignore[no-redef]
                [[1], [256], [512], [1024]], [[2], [4], [8], [16], [32]], [[64], [128]], [], [M * 32]
            )
            scale_layout: gl.constexpr = gl.DistributedLinearLayout(  # type: ignore[no-redef]
                [[1], [2], [4], [8]], [[16], [32], [64], [128], [256]], [[512], [1024]], [], [M * 32]
            )

        x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PARTS * ROWS, 128], swizzled)
        w_smem = gl.allocate_shared_memory(gl.int64, [STAGES, M * 32], plain)
        s_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, M * 32], plain)

        # A repacked tile of 64 rows holds its chunks one after the other: 2,048 words, 2,048 scales each.
        tile = (expert.to(gl.int64) * (num_outputs // 64) + tile_n * HALVES) * (depth * 4)
        words_at = gl.arange(0, M * 32, flat)
        w_ptrs = w_ptr + tile + words_at // 2048 * (depth * 4) + words_at % 2048
        bytes_at = gl.arange(0, M * 32, flat_bytes)
        s_ptrs = s_ptr + tile + bytes_at // 2048 * (depth * 4) + bytes_at % 2048
        pieces = gl.arange(0, PARTS * ROWS, gl.SliceLayout(1, rows_of_16))
        x_starts = (row + pieces % ROWS).to(gl.int64) * depth + pieces // ROWS * 128
        x_ptrs = x_ptr + x_starts[:, None] + gl.arange(0, 128, gl.SliceLayout(0, rows_of_16))[None, :]

        x_mask = None
        if MASKED:
            x_mask = (row + pieces % ROWS < end)[:, None]

        for ahead in gl.static_range(STAGES - 1):
            _copy_step(x_ptrs, x_mask, w_ptrs, s_ptrs, x_smem, w_smem, s_smem, first + ahead, limit,
                       STAGES, CHUNK)  # fmt: skip
        acc = gl.zeros((M, ROWS), gl.float32, mma)
        for step in range(first, limit):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            _barrier()
            _copy_step(x_ptrs, x_mask, w_ptrs, s_ptrs, x_smem, w_smem, s_smem, step + STAGES - 1, limit,
                       STAGES, CHUNK)  # fmt: skip
            stage = step % STAGES
            x = x_smem.index(stage)
            words = w_smem.index(stage).load(word_layout)
            words = gl.permute(gl.reshape(words, (HALVES, 2, 2, 2, 4, 8, 4, 2)), (0, 4, 2, 5, 1, 6, 3, 7))
            words = gl.convert_layout(gl.reshape(words, (M, 32)), operand)
            scales = s_smem.index(stage).load(scale_layout)
            scales = gl.permute(gl.reshape(scales, (HALVES, 4, 8, 4, 2, 2, 2, 2)), (0, 1, 5, 2, 4, 3, 6, 7))
            scales = gl.convert_layout(gl.reshape(scales, (M, 32)), operand)
            a0, a1 = _decode_half(words, scales, _LOW_ASM, operand)
            acc = warpgroup_mma(a0, x.slice(0 * ROWS, ROWS).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(a1, x.slice(1 * ROWS, ROWS).permute((1, 0)), acc, is_async=True)
            a2, a3 = _decode_half(words, scales, _HIGH_ASM, operand)
            acc = warpgroup_mma(a2, x.slice(2 * ROWS, ROWS).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(a3, x.slice(3 * ROWS, ROWS).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))

        store: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, num_warps], [0, 1])
        if SPLIT_K > 1:
            acc = gl.convert_layout(acc, store)
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, store))
            columns = tile_n * M + gl.arange(0, M, gl.SliceLayout(1, store))
            slots = (gl.program_id(1) * num_rows + rows).to(gl.int64) * num_outputs
            gl.store(out_ptr + slots[None, :] + columns[:, None], acc, mask=(rows < end)[None, :])
        else:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, mma))
            scale = gl.load(x_scale_ptr + rows, mask=rows < end, other=0.0) * (
                gl.load(global_scale_ptr) * 8.0
            )
            acc = acc * scale[None, :]
            if GATED:
                pairs = gl.permute(gl.reshape(acc, (M // 16, 2, 8, ROWS)), (0, 2, 3, 1))
                gate, up = gl.split(pairs)
                gate = gate.to(out_ptr.dtype.element_ty).to(gl.float32)
                up = up.to(out_ptr.dtype.element_ty).to(gl.float32)
                acc = gl.reshape(gate / (1.0 + gl.exp(-gate)) * up, (M // 2, ROWS))
            WIDTH: gl.constexpr = acc.shape[0]
            acc = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), store)
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, store))
            columns = tile_n * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, store))
            places = rows
            if not GATED:
                places = gl.load(index_ptr + rows, mask=rows < end, other=0)
            row_size = num_outputs // M * WIDTH
            out_ptrs = out_ptr + places.to(gl.int64)[None, :] * row_size + columns[:, None]
            gl.store(out_ptrs, acc, mask=(rows < end)[None, :])


@triton.jit(do_not_specialize=("num_rows",))
def _add_splits_kernel(
    partial_ptr,
    out_ptr,
    offsets_ptr,
    index_ptr,
    x_scale_ptr,
    global_scale_ptr,
    num_rows,
    num_outputs,
    EXPERTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(offsets_ptr + EXPERTS):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < num_outputs
        acc = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(SPLIT_K):
            start = (part * num_rows + row).to(tl.int64) * num_outputs
            acc += tl.load(partial_ptr + start + columns, mask=mask, other=0.0)
        acc = acc * (tl.load(x_scale_ptr + row) * tl.load(global_scale_ptr) * 8.0)
        place = tl.load(index_ptr + row).to(tl.int64)
        tl.store(out_ptr + place * num_outputs + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    tiles = max_tiles(rows.num_rows, num_experts, tile.rows) * (num_outputs // (16 * tile.warps))
    target = out
    if tile.split_k > 1:
        target = torch.empty(
            (tile.split_k, rows.num_rows, num_outputs), dtype=torch.float32, device=out.device
        )
    _stream_kernel[(tiles, tile.split_k)](
        rows.x,
        packed.view(torch.int64),
        block_scale.view(torch.uint8),
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
        ROWS=tile.rows,
        CHUNK=CHUNK,
        STAGES=tile.stages,
        MASKED=tile.masked,
        num_warps=tile.warps,
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


def _aot_spec(tile: StreamTile, gated: bool):
    pointers = {
        "x_ptr": "*fp8e4nv",
        "w_ptr": "*i64",
        "s_ptr": "*u8",
        "offsets_ptr": "*i32",
        "index_ptr": "*i32",
    }
    pointers |= {"x_scale_ptr": "*fp32", "global_scale_ptr": "*fp32"}
    pointers["out_ptr"] = "*bf16" if tile.split_k == 1 else "*fp32"
    numbers = dict.fromkeys(("num_rows", "num_outputs", "depth"), "i32")
    constants = {"GATED": gated, "SPLIT_K": tile.split_k, "EXPERTS": 16, "ROWS": tile.rows, "CHUNK": CHUNK}
    constants |= {"STAGES": tile.stages, "MASKED": tile.masked, "num_warps": tile.warps}
    aligned = (*pointers, "num_outputs", "depth")  # as a launch finds them; 16-byte copies need to know
    return _stream_kernel, pointers | numbers, constants, {"num_warps": tile.warps}, aligned


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
    _aot_spec(StreamTile(16, 4, 4), gated=True),
    _aot_spec(StreamTile(16, 4, 4, split_k=4), gated=False),
    _aot_spec(StreamTile(64, 4, 2, masked=True), gated=True),
    _aot_spec(StreamTile(128, 8, 2), gated=False),
]
"""Compiled for sm_90 only: the instruction does not exist elsewhere."""
