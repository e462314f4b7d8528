"""The Gluon kernel of ``nvfp4_stream``: grouped products of e4m3 rows with repacked NVFP4 weights, and split sums.

The copy engine fills a ring of stages, each half a chunk (256 in features) of activations and words, and a shorter ring
of whole chunks' scales. Words go from a stage to registers, are decoded there and multiply from there; activations
multiply from their stage. Rows that a tile has room for and its expert lacks are zeros that were never read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from outrider.kernels.gluon_names import async_load, barrier
from outrider.kernels.nvfp4_decode import block_ptx
from outrider.kernels.ragged import group_place


def _decode_asm(half: int) -> str:
    """PTX for blocks 2 half and 2 half + 1 of four: words $8..$11, scale bytes $12 -> 8 registers of 4 e4m3 values."""
    return "\n".join(
        block_ptx(
            "$12",
            2 * half + block,
            (f"${8 + 2 * block}", f"${9 + 2 * block}"),
            tuple(f"${4 * block + i}" for i in range(4)),
        )
        for block in range(2)
    )


_LOW_ASM = gl.constexpr(_decode_asm(0))
_HIGH_ASM = gl.constexpr(_decode_asm(1))
_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))


@gluon.jit
def _operand(p0, p1, p2, p3, layout: gl.constexpr):
    """Four [M, 32] pieces side by side as one [M, 128] register operand."""
    pieces = gl.join(gl.join(p0, p2), gl.join(p1, p3))
    M: gl.constexpr = p0.shape[0]
    return gl.convert_layout(gl.reshape(gl.permute(pieces, (0, 2, 3, 1)), (M, 128)), layout)


@gluon.jit
def _load_scales(s_smem, layout: gl.constexpr):
    """A chunk's scale bytes, u8 [M, 32], four of a row in a register: of both blocks of both halves."""
    TILES: gl.constexpr = s_smem.shape[0]
    scale_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]],
        [[0, 0, 16], [0, 0, 32], [0, 0, 64], [0, 0, 128], [0, 1, 0]],
        [[0, 2, 0], [0, 4, 0], [1, 0, 0]][: TILES + 1],
        [],
        [TILES, 8, 256],
    )
    # Named as in ``nvfp4_repack``: w g q | h r8 cp e.
    scales = gl.reshape(s_smem.load(scale_layout), (TILES, 4, 8, 4, 2, 2, 4))
    scales = gl.reshape(gl.permute(scales, (0, 1, 5, 2, 4, 3, 6)), (TILES * 64, 32))
    return gl.convert_layout(scales, layout)


@gluon.jit
def _decode(w_smem, scales, ASM: gl.constexpr, layout: gl.constexpr):
    """Half a chunk's weights as two [M, 128] operands, from a stage of words and the chunk's scales."""
    TILES: gl.constexpr = w_smem.shape[0]
    word_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0]],
        [[0, 0, 0, 0, 4], [0, 0, 0, 0, 8], [0, 0, 0, 0, 16], [0, 0, 0, 0, 32], [0, 0, 0, 0, 64]],
        [[0, 0, 0, 0, 128], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]][: TILES + 1],
        [],
        [TILES, 4, 1, 2, 256],
    )
    # Named as in ``nvfp4_repack``: h r8 | w g q | e and the word's half.
    words = gl.reshape(w_smem.load(word_layout), (TILES, 2, 2, 4, 8, 4, 4))
    words = gl.reshape(gl.permute(words, (0, 3, 2, 4, 1, 5, 6)), (TILES * 64, 32))
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        ASM,
        _CONSTRAINTS,
        [gl.convert_layout(words, layout), scales],
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
    begin = 0
    end = 0
    local = 0
    done = 0
    for e in gl.static_range(EXPERTS):
        first = gl.load(offsets_ptr + e)
        last = gl.load(offsets_ptr + e + 1)
        started = tile >= done  # the last expert of whom this holds has the tile
        expert = gl.where(started, e, expert)
        begin = gl.where(started, first, begin)
        end = gl.where(started, last, end)
        local = gl.where(started, tile - done, local)
        done += (last - first + ROWS - 1) // ROWS * tiles_n
    blocks = gl.maximum((end - begin + ROWS - 1) // ROWS, 1)
    return gl.where(tile < done, expert, -1), begin + local % blocks * ROWS, end, local // blocks


@gluon.jit
def _copy(sources, stages, ready, place, turn, half: gl.constexpr, turns):
    """Start copying half chunk ``turn`` after chunk ``first``, a low one with the chunk's scales, if there are so many.

    ``half``: ``turn % 2``, known when this is compiled.
    """
    x_desc, w_desc, s_desc = sources
    x_smem, w_smem, s_smem = stages
    row, end, tile, first = place
    chunk = first + turn // 2
    stage = turn % ready.shape[0]
    bar = ready.index(stage)
    more = turn < turns
    SIZE: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    SCALES: gl.constexpr = s_desc.block_type.nbytes if half == 0 else 0
    mbarrier.expect(bar, SIZE + SCALES, pred=more)
    group, last, x_row = group_place(row, end)
    async_load(x_desc, [group, last, 4 * chunk + 2 * half, x_row, 0], bar, x_smem.index(stage), pred=more)
    async_load(w_desc, [tile, 4 * chunk, half, 0, 0], bar, w_smem.index(stage), pred=more)
    if half == 0:
        async_load(s_desc, [tile, 8 * chunk, 0], bar, s_smem.index(turn // 2 % s_smem.shape[0]), pred=more)


@gluon.jit
def _wait(ready, turn):
    """Wait until half chunk ``turn`` is there."""
    mbarrier.wait(ready.index(turn % ready.shape[0]), turn // ready.shape[0] & 1)


@gluon.jit
def _multiply(acc, stages, scales, turn, ASM: gl.constexpr, mma: gl.constexpr):
    """Start adding the product of half chunk ``turn``; reads its weights, leaves its activations in use."""
    x_smem, w_smem, _ = stages
    ROWS: gl.constexpr = x_smem.shape[4]
    stage = turn % x_smem.shape[0]
    a0, a1 = _decode(w_smem.index(stage), scales, ASM, gl.DotOperandLayout(0, mma, 4))
    x = x_smem.index(stage).reshape([2 * ROWS, 128])
    acc = warpgroup_mma(a0, x.slice(0, ROWS).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma(a1, x.slice(ROWS, ROWS).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _store(acc, row, end, tile_n, out, mma: gl.constexpr, GATED: gl.constexpr, SPLIT_K: gl.constexpr):
    """Write ``acc`` [M, ROWS], scaled and gated, to the rows of a tile; a part of a split depth as it is."""
    M: gl.constexpr = acc.shape[0]
    ROWS: gl.constexpr = acc.shape[1]
    out_ptr, index_ptr, x_scale_ptr, global_scale_ptr, num_rows, num_outputs = out
    store: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, M // 16], [0, 1])
    if SPLIT_K > 1:
        acc = gl.convert_layout(acc, store)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, store))
        columns = tile_n * M + gl.arange(0, M, gl.SliceLayout(1, store))
        slots = (gl.program_id(1) * num_rows + rows).to(gl.int64) * num_outputs
        gl.store(out_ptr + slots[None, :] + columns[:, None], acc, mask=(rows < end)[None, :])
    else:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, mma))
        scale = gl.load(x_scale_ptr + rows, mask=rows < end, other=0.0) * (gl.load(global_scale_ptr) * 8.0)
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


@gluon.jit
def _run_tile(
    sources, place, steps, tile_n, out,
    GATED: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Multiply ``steps`` chunks of a tile of as many rows as a box of activations has, and write it."""
    x_desc, w_desc, s_desc = sources
    M: gl.constexpr = 16 * num_warps
    ROWS: gl.constexpr = x_desc.block_type.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 32])
    stages = (
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, 1, 2, ROWS, 128], x_desc.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES, M // 64, 4, 1, 2, 256], w_desc.layout),
        gl.allocate_shared_memory(gl.uint8, [STAGES // 2, M // 64, 8, 256], s_desc.layout),
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    for turn in gl.static_range(STAGES - 1):
        _copy(sources, stages, ready, place, turn, turn % 2, 2 * steps)
    acc = gl.zeros((M, ROWS), gl.float32, mma)
    for step in range(steps):
        # The tensor cores multiply the low half while the high half is decoded. No product runs across the loop's
        # end: the compiler would let the next turn compute the same registers anew under it.
        low = 2 * step
        _wait(ready, low)
        scales = _load_scales(stages[2].index(step % (STAGES // 2)), gl.DotOperandLayout(0, mma, 4))
        acc = _multiply(acc, stages, scales, low, _LOW_ASM, mma)
        barrier()  # every warp is past the last high half and has these scales
        _copy(sources, stages, ready, place, low + STAGES - 1, (STAGES - 1) % 2, 2 * steps)
        _wait(ready, low + 1)
        acc = _multiply(acc, stages, scales, low + 1, _HIGH_ASM, mma)
        acc = warpgroup_mma_wait(2, deps=(acc,))  # both products of the low half
        barrier()
        _copy(sources, stages, ready, place, low + STAGES, STAGES % 2, 2 * steps)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    _store(acc, place[0], place[1], tile_n, out, mma, GATED, SPLIT_K)


@gluon.jit(do_not_specialize=("num_rows",))
def _stream_kernel(
    wide_desc,
    narrow_desc,
    w_desc,
    s_desc,
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
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    NARROW_STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    # num_outputs counts stored weight rows: gate and up rows when GATED.
    M: gl.constexpr = 16 * num_warps
    WIDE: gl.constexpr = wide_desc.block_type.shape[3]
    NARROW: gl.constexpr = narrow_desc.block_type.shape[3]
    expert, row, end, tile_n = _find_tile(offsets_ptr, gl.program_id(0), num_outputs // M, WIDE, EXPERTS)
    if expert >= 0:
        steps = depth // CHUNK
        split_steps = (steps + SPLIT_K - 1) // SPLIT_K
        first = gl.program_id(1) * split_steps
        steps = gl.minimum(split_steps, steps - first)
        if SPLIT_K == 1:
            gl.assume(steps > 0)  # spares the path around the loop
        tile = expert * (num_outputs // 64) + tile_n * (M // 64)

        place = (row, end, tile, first)
        wide = (wide_desc, w_desc, s_desc)
        narrow = (narrow_desc, w_desc, s_desc)
        out = (out_ptr, index_ptr, x_scale_ptr, global_scale_ptr, num_rows, num_outputs)
        if NARROW == WIDE or end - row > NARROW:
            _run_tile(wide, place, steps, tile_n, out, GATED, SPLIT_K, STAGES, num_warps)
        else:
            _run_tile(narrow, place, steps, tile_n, out, GATED, SPLIT_K, NARROW_STAGES, num_warps)


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
