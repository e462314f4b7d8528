"""The two products of ``moe_few``: gate and up of all chosen experts, down of all and their sum.

Launched by ``moe_few`` alone, on at most ``FEW_ROWS`` tokens. Grids are fixed by the number of tokens; programs of
experts that nobody chose leave at once (CUDA-graph safe).
"""

from __future__ import annotations

import triton
import triton.language as tl

from outrider.kernels.activation import swiglu_rounded
from outrider.kernels.moe_gemm import Tile
from outrider.kernels.overlap import wait_for_inputs
from outrider.kernels.quantize import to_fp8

FEW_ROWS = 16
"""Rows of the only row tile: the narrowest that the tensor cores take."""

FEW_TILES = Tile(16, 64, 256, True, 3, 4), Tile(16, 64, 256, True, 5, 4, split_k=2)
"""(gate-up tile, down tile).

H200, 2026-11-26, a whole layer: gate-up of depth 256 instead of 128 106.6 / 108.1 us at one token, 184.8 / 188.1 at 4,
379.6 / 384.0 at 16; two splits of the down product instead of one or three 185.0 / 188.3 / 186.4 at 4:
benchmarks/results/kernels_few_h200.json
"""


@triton.jit
def _chosen(ids_ptr, num_tokens, rank, ROWS: tl.constexpr, BINS: tl.constexpr):
    """``(experts chosen by any row, the one of this rank, which rows chose it, which chose any)``."""
    rows = tl.arange(0, ROWS)
    bins = tl.arange(0, BINS)
    ids = tl.load(ids_ptr + rows, mask=rows < num_tokens, other=-1)
    chosen = tl.max((ids[:, None] == bins[None, :]).to(tl.int32), 0)
    mine = (chosen > 0) & (tl.cumsum(chosen, 0) - 1 == rank)
    expert = tl.sum(tl.where(mine, bins, 0), 0)
    return tl.sum(chosen, 0), expert, ids == expert, ids >= 0


@triton.jit
def _gate_up(
    x_desc, w_desc, row, gate_row, up_row, depth,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Both products of one tile, ``[OUTPUTS, ROWS]`` each."""
    gate = tl.zeros((OUTPUTS, ROWS), tl.float32)
    up = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        x = x_desc.load([row, k])
        gate = tl.dot(w_desc.load([gate_row, k]), x.T, gate)
        up = tl.dot(w_desc.load([up_row, k]), x.T, up)
    return gate, up


@triton.jit
def _store_swiglu(
    out_ptr, gate, up, mine, scale_ptr, tile_n, inter,
    MODEL_DTYPE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    out = swiglu_rounded(gate, up, MODEL_DTYPE).to(tl.float32)
    columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, ROWS)
    mask = mine[None, :] & (columns < inter)[:, None]
    tl.store(out_ptr + rows[None, :] * inter + columns[:, None], to_fp8(out, tl.load(scale_ptr)), mask=mask)


@triton.jit(do_not_specialize=("num_tokens",))
def _few_gate_up_kernel(
    x_desc,
    w_desc,
    shared_desc,
    out_ptr,
    shared_out_ptr,
    ids_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    shared_x_scale_ptr,
    shared_w_scale_ptr,
    shared_out_scale_ptr,
    num_tokens,
    inter,
    shared_inter,
    depth,
    MODEL_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The shared expert's tiles come first, then those of each chosen expert; the grid allows for the most.
    program = tl.program_id(0)
    shared_tiles = tl.cdiv(shared_inter, OUTPUTS)
    if program < shared_tiles:
        row = program * OUTPUTS
        outputs = row + tl.arange(0, OUTPUTS)
        inside = outputs < shared_inter
        scale = tl.load(shared_x_scale_ptr)
        gate_scale = scale * tl.load(shared_w_scale_ptr + outputs, mask=inside, other=0.0)
        up_scale = scale * tl.load(shared_w_scale_ptr + shared_inter + outputs, mask=inside, other=0.0)
        wait_for_inputs(OVERLAP)
        gate, up = _gate_up(x_desc, shared_desc, ROWS, row, shared_inter + row, depth, ROWS, OUTPUTS, DEPTH)
        gate *= gate_scale[:, None]
        up *= up_scale[:, None]
        mine = tl.arange(0, ROWS) < num_tokens
        _store_swiglu(
            shared_out_ptr, gate, up, mine, shared_out_scale_ptr, program, shared_inter,
            MODEL_DTYPE, ROWS, OUTPUTS,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(inter, OUTPUTS)
        tile_n = (program - shared_tiles) % tiles
        rank = (program - shared_tiles) // tiles
        wait_for_inputs(OVERLAP)
        num_chosen, expert, mine, _ = _chosen(ids_ptr, num_tokens, rank, ROWS, BINS)
        if rank < num_chosen:
            row = expert * 2 * inter + tile_n * OUTPUTS
            scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
            gate, up = _gate_up(x_desc, w_desc, 0, row, row + inter, depth, ROWS, OUTPUTS, DEPTH)
            _store_swiglu(
                out_ptr, gate * scale, up * scale, mine, out_scale_ptr, tile_n, inter,
                MODEL_DTYPE, ROWS, OUTPUTS,
            )  # fmt: skip


@triton.jit
def _part(
    x_desc, w_desc, w_row, split, depth,
    SPLIT_K: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One split of one tile of a product, ``[OUTPUTS, ROWS]``."""
    steps = tl.cdiv(tl.cdiv(depth, DEPTH), SPLIT_K)
    first = split * steps * DEPTH
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in tl.range(first, tl.minimum(first + steps * DEPTH, depth), DEPTH):
        acc = tl.dot(w_desc.load([w_row, k]), x_desc.load([0, k]).T, acc)
    return acc


@triton.jit(do_not_specialize=("num_tokens",))
def _few_down_kernel(
    x_desc,
    shared_x_desc,
    w_desc,
    shared_desc,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    ids_ptr,
    x_scale_ptr,
    w_scale_ptr,
    shared_x_scale_ptr,
    shared_w_scale_ptr,
    num_tokens,
    hidden,
    depth,
    shared_depth,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Of a column tile's programs (splits of the shared and of every chosen expert) the last to arrive adds the
    # partial sums in a fixed order, so the result does not depend on who was last.
    wait_for_inputs(OVERLAP)
    program = tl.program_id(0)
    split = program % SPLIT_K
    num_tiles = tl.cdiv(hidden, OUTPUTS)
    tile_n = (program // SPLIT_K) % num_tiles
    rank = program // SPLIT_K // num_tiles - 1  # -1: the shared expert
    num_chosen, expert, mine, routed = _chosen(ids_ptr, num_tokens, rank, ROWS, BINS)
    if rank < num_chosen:
        rows = tl.arange(0, ROWS)
        columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = (columns < hidden)[:, None]
        plane = ROWS * hidden
        slots = partial_ptr + split * plane + rows[None, :] * hidden + columns[:, None]
        if rank < 0:
            scale = tl.load(shared_w_scale_ptr + columns, mask=columns < hidden, other=0.0)
            scale *= tl.load(shared_x_scale_ptr)
            acc = _part(
                shared_x_desc, shared_desc, tile_n * OUTPUTS, split, shared_depth,
                SPLIT_K, ROWS, OUTPUTS, DEPTH,
            )  # fmt: skip
            acc *= scale[:, None]
            tl.store(slots + SPLIT_K * plane, acc, mask=inside & (rows < num_tokens)[None, :])
        else:
            w_row = expert * hidden + tile_n * OUTPUTS
            expert_scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
            acc = _part(x_desc, w_desc, w_row, split, depth, SPLIT_K, ROWS, OUTPUTS, DEPTH)
            acc *= expert_scale
            tl.store(slots, acc, mask=inside & mine[None, :])
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + tile_n, 1, sem="acq_rel")
        if arrived == (num_chosen + 1) * SPLIT_K - 1:
            mask = inside & (rows < num_tokens)[None, :]
            slots = partial_ptr + rows[None, :] * hidden + columns[:, None]
            own = tl.zeros((OUTPUTS, ROWS), tl.float32)
            shared = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for part in tl.static_range(SPLIT_K):
                own += tl.load(
                    slots + part * plane, mask=mask & routed[None, :], other=0.0, cache_modifier=".cg"
                )
                shared += tl.load(
                    slots + (SPLIT_K + part) * plane, mask=mask, other=0.0, cache_modifier=".cg"
                )
            dtype: tl.constexpr = out_ptr.dtype.element_ty
            total = own.to(dtype).to(tl.float32) + shared.to(dtype).to(tl.float32)
            tl.store(out_ptr + rows[None, :] * hidden + columns[:, None], total.to(dtype), mask=mask)
            tl.store(arrivals_ptr + tile_n, 0)


_SCALES = {
    "ids_ptr": "*i32",
    "x_scale_ptr": "*fp32",
    "w_scale_ptr": "*fp32",
    "shared_x_scale_ptr": "*fp32",
    "shared_w_scale_ptr": "*fp32",
    "num_tokens": "i32",
    "depth": "i32",
}


def _aot_specs(up: Tile, down: Tile):
    """(kernel, signature, constants, options) of the two products with these tiles."""

    def descriptors(tile: Tile, *names: str) -> dict[str, str]:
        rows = {"x": FEW_ROWS, "w": tile.outputs}
        return {n: f"tensordesc<fp8e4nv[{rows['x' if 'x_' in n else 'w']}, {tile.depth}]>" for n in names}

    up_signature = {
        **_SCALES,
        **descriptors(up, "x_desc", "w_desc", "shared_desc"),
        "out_ptr": "*fp8e4nv",
        "shared_out_ptr": "*fp8e4nv",
        "out_scale_ptr": "*fp32",
        "shared_out_scale_ptr": "*fp32",
        "inter": "i32",
        "shared_inter": "i32",
    }
    down_signature = {
        **_SCALES,
        **descriptors(down, "x_desc", "shared_x_desc", "w_desc", "shared_desc"),
        "out_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "arrivals_ptr": "*i32",
        "hidden": "i32",
        "shared_depth": "i32",
    }

    def constants(tile: Tile, **others):
        return {
            "ROWS": FEW_ROWS,
            "OUTPUTS": tile.outputs,
            "DEPTH": tile.depth,
            "BINS": 16,
            "OVERLAP": True,
            **others,
        }

    def options(tile: Tile) -> dict[str, int]:
        return {"num_warps": tile.warps, "num_stages": tile.stages}

    return [
        (
            _few_gate_up_kernel,
            up_signature,
            constants(up, MODEL_DTYPE=tl.bfloat16),
            options(up),
        ),
        (_few_down_kernel, down_signature, constants(down, SPLIT_K=down.split_k), options(down)),
    ]


AOT_SPECS = _aot_specs(*FEW_TILES)
