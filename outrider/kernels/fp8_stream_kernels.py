"""The Gluon kernel of ``fp8_stream``: grouped products of e4m3 rows with e4m3 weights as one endless stream.

A program takes tile after tile. The copy engine fills a ring of stages, each 128 of the depth, and runs ahead across
the border of two tiles, so that memory does not wait while a tile is written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from outrider.kernels.gluon_names import async_load, barrier


@gluon.jit
def _find_tile(offsets_ptr, tile, tiles_n, NARROW: gl.constexpr, WIDE: gl.constexpr, EXPERTS: gl.constexpr):
    """``(expert, first row, rows from there on, output tile)``; behind the last tile there are no rows.

    Experts with wide tiles come first, so that programs get alike shares of them. The row blocks of an output tile
    are neighbours, in another order for the next expert, so that no program gets only full ones.
    """
    expert = 0
    begin = 0
    end = 0
    local = 0
    turn = 0
    done = 0
    rank = 0
    for narrow in gl.static_range(2):
        for e in gl.static_range(EXPERTS):
            first = gl.load(offsets_ptr + e)
            last = gl.load(offsets_ptr + e + 1)
            is_next = (last - first <= NARROW) == (narrow == 1)
            has_begun = is_next & (tile >= done)  # the last expert of whom this holds has the tile
            expert = gl.where(has_begun, e, expert)
            begin = gl.where(has_begun, first, begin)
            end = gl.where(has_begun, last, end)
            local = gl.where(has_begun, tile - done, local)
            turn = gl.where(has_begun, rank, turn)
            done += gl.where(is_next, (last - first + WIDE - 1) // WIDE * tiles_n, 0)
            rank += is_next.to(gl.int32)
    blocks = gl.maximum((end - begin + WIDE - 1) // WIDE, 1)
    row = begin + (local + turn) % blocks * WIDE
    return expert, row, gl.where(tile < done, end - row, 0), local // blocks


@gluon.jit
def _copy(sources, stages, ready, cursor, turn, job, EXPERTS: gl.constexpr):
    """Start copying what ``cursor`` points at into the stage of ``turn``; returns the cursor moved on."""
    x_desc, w_desc = sources
    x_smem, w_smem = stages
    offsets_ptr, steps, tiles_n = job
    step, tile, expert, row, left, tile_n = cursor
    NARROW: gl.constexpr = x_desc.block_type.shape[0]
    WIDE: gl.constexpr = x_smem.shape[1]
    X_BYTES: gl.constexpr = x_desc.block_type.nbytes
    W_BYTES: gl.constexpr = w_desc.block_type.nbytes
    BLOCKS: gl.constexpr = w_desc.block_type.shape[1]
    stage = turn % ready.shape[0]
    bar = ready.index(stage)
    if left > NARROW:
        mbarrier.expect(bar, W_BYTES + WIDE // NARROW * X_BYTES)
        for i in gl.static_range(WIDE // NARROW):
            async_load(
                x_desc, [row + i * NARROW, step * 128], bar, x_smem.index(stage).slice(i * NARROW, NARROW)
            )
    elif left > 0:
        mbarrier.expect(bar, W_BYTES + X_BYTES)
        async_load(x_desc, [row, step * 128], bar, x_smem.index(stage).slice(0, NARROW))
    if left > 0:
        async_load(w_desc, [expert, tile_n * BLOCKS, 0, 0, step * 128], bar, w_smem.index(stage))
    step += 1
    if step == steps:
        step = 0
        tile += gl.num_programs(0)
        expert, row, left, tile_n = _find_tile(offsets_ptr, tile, tiles_n, NARROW, WIDE, EXPERTS)
    return step, tile, expert, row, left, tile_n


@gluon.jit
def _multiply(
    sources, stages, ready, cursor, turn, job,
    ROWS: gl.constexpr, EXPERTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The product of a tile whose first stage is that of ``turn``: ``(f32 [ROWS, weight rows], cursor, next turn)``."""
    x_smem, w_smem = stages
    STAGES: gl.constexpr = ready.shape[0]
    N: gl.constexpr = w_smem.shape[2] * w_smem.shape[3] * 64
    WARPS_M: gl.constexpr = min(num_warps, ROWS // 16)
    WARPS_N: gl.constexpr = num_warps // WARPS_M
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS_M, WARPS_N], [16, N // WARPS_N, 32])
    acc = gl.zeros((ROWS, N), gl.float32, mma)
    for _ in range(job[1]):
        stage = turn % STAGES
        mbarrier.wait(ready.index(stage), turn // STAGES & 1)
        w = w_smem.index(stage).reshape([N, 128])
        acc = warpgroup_mma(x_smem.index(stage).slice(0, ROWS), w.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        barrier()  # every warp is past the product before
        cursor = _copy(sources, stages, ready, cursor, turn + STAGES - 1, job, EXPERTS)
        turn += 1
    return warpgroup_mma_wait(0, deps=(acc,)), cursor, turn


@gluon.jit
def _store(
    out, out_ptr, index_ptr, row, left, tile_n, num_columns, WIDTH: gl.constexpr, num_warps: gl.constexpr
):
    """Write ``out`` [rows, columns], ``WIDTH`` neighbours a thread; row r goes to row ``index_ptr[r]``, if given."""
    ROWS: gl.constexpr = out.shape[0]
    COLUMNS: gl.constexpr = out.shape[1]
    ACROSS: gl.constexpr = min(32, COLUMNS // WIDTH)
    layout: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = tile_n * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    is_row = rows < row + left
    places = rows
    if index_ptr is not None:
        places = gl.load(index_ptr + rows, mask=is_row, other=0)
    out_ptrs = out_ptr + places.to(gl.int64)[:, None] * num_columns + columns[None, :]
    mask = is_row[:, None] & (columns < num_columns)[None, :]
    gl.store(out_ptrs, gl.convert_layout(out, layout), mask=mask)


@gluon.jit
def _run_tile(
    sources, stages, ready, cursor, turn, job, place, scale, outs,
    ROWS: gl.constexpr, MODEL_DTYPE: gl.constexpr, EXPERTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Multiply, scale and write a tile of ``ROWS`` rows; of gate and up rows their SwiGLU, in e4m3."""
    out_ptr, index_ptr, out_scale_ptr, num_columns = outs
    row, left, tile_n = place
    BLOCKS: gl.constexpr = stages[1].shape[2]
    acc, cursor, turn = _multiply(sources, stages, ready, cursor, turn, job, ROWS, EXPERTS, num_warps)
    acc = acc * scale
    if stages[1].shape[3] == 2:
        gate, up = gl.split(gl.permute(gl.reshape(acc, (ROWS, BLOCKS, 2, 64)), (0, 1, 3, 2)))
        gate = gate.to(MODEL_DTYPE).to(gl.float32)
        up = up.to(MODEL_DTYPE).to(gl.float32)
        out = (gate * (1.0 / (1.0 + gl.exp(-gate))) * up).to(MODEL_DTYPE).to(gl.float32) / gl.load(
            out_scale_ptr
        )
        out = gl.minimum(gl.maximum(out, -448.0), 448.0).to(gl.float8e4nv)
        out = gl.reshape(out, (ROWS, BLOCKS * 64))
        _store(out, out_ptr, None, row, left, tile_n, num_columns, 16, num_warps)
    else:
        _store(acc.to(MODEL_DTYPE), out_ptr, index_ptr, row, left, tile_n, num_columns, 8, num_warps)
    return cursor, turn


@gluon.jit
def _fp8_stream_kernel(
    x_desc,
    w_desc,
    out_ptr,
    offsets_ptr,
    index_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    num_columns,
    depth,
    WIDE: gl.constexpr,
    MODEL_DTYPE: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    NARROW: gl.constexpr = x_desc.block_type.shape[0]
    BLOCKS: gl.constexpr = w_desc.block_type.shape[1]
    PARTS: gl.constexpr = w_desc.block_type.shape[2]
    steps = (depth + 127) // 128  # at least STAGES, so that the cursor is never more than one tile ahead
    tiles_n = (num_columns + BLOCKS * 64 - 1) // (BLOCKS * 64)
    job = (offsets_ptr, steps, tiles_n)
    outs = (out_ptr, index_ptr, out_scale_ptr, num_columns)
    sources = (x_desc, w_desc)
    stages = (
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDE, 128], x_desc.layout),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, BLOCKS, PARTS, 64, 128], w_desc.layout),
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)

    tile = gl.program_id(0)
    expert, row, left, tile_n = _find_tile(offsets_ptr, tile, tiles_n, NARROW, WIDE, EXPERTS)
    cursor = (0, tile, expert, row, left, tile_n)
    for ahead in range(STAGES - 1):
        cursor = _copy(sources, stages, ready, cursor, ahead, job, EXPERTS)
    turn = 0
    while left > 0:
        scale = gl.load(x_scale_ptr) * gl.load(w_scale_ptr + expert)
        place = (row, left, tile_n)
        if left > NARROW:
            cursor, turn = _run_tile(
                sources, stages, ready, cursor, turn, job, place, scale, outs, WIDE, MODEL_DTYPE, EXPERTS, num_warps
            )  # fmt: skip
        else:
            cursor, turn = _run_tile(
                sources, stages, ready, cursor, turn, job, place, scale, outs, NARROW, MODEL_DTYPE, EXPERTS, num_warps
            )  # fmt: skip
        expert = cursor[2]
        row = cursor[3]
        left = cursor[4]
        tile_n = cursor[5]
