"""The two products of ``moe_one_nvfp4``: gate and up of the shared and the routed expert, down of both and their sum.

Launched by ``moe_one_nvfp4`` alone, on one token.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from outrider.kernels.activation import swiglu_rounded
from outrider.kernels.fp8_row import add_fp8_tile, load_fp8_tile, plane_place, sum_fp8_rows
from outrider.kernels.nvfp4_row import (
    SCALE_SHIFT,
    add_expert_chunk,
    load_expert_chunk,
    store_half_blocks,
    sum_expert_rows,
)
from outrider.kernels.overlap import wait_for_inputs


@dataclass(frozen=True)
class OneTile:
    """Launch constants of both products.

    ``outputs`` of a program of the shared expert's gate and up, ``first`` of these programs before the routed expert's,
    which have ``groups`` of 16 gate and up rows each (2, 4, ...). Programs of the down product have 8 outputs and
    ``down_registers`` a thread, which decide how many run at a time.
    """

    outputs: int = 2
    groups: int = 2
    first: int = 330
    up_warps: int = 4
    down_warps: int = 4
    down_registers: int = 96


ONE_TILE = OneTile()
"""H200, 2026-11-26, a whole layer: 91.0 us, with other sizes 92 to 103: benchmarks/results/kernels_few_nvfp4_h200.json.

Gate and up alone 32.7 us, with the routed expert's programs last 36.6 (floor 31); down alone 20.1, with the registers
that the compiler takes 24.1, because not all programs run at once then (floor 16).
"""


@triton.jit
def _one_gate_up_kernel(
    x_ptr,
    half_ptr,
    half_scale_ptr,
    id_ptr,
    w_ptr,
    s_ptr,
    w_scale_ptr,
    shared_ptr,
    shared_scale_ptr,
    out_ptr,
    out_scale_ptr,
    shared_out_ptr,
    inter,
    shared_inter,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST: tl.constexpr,
    WARPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The shared expert's first programs come first: their weights are on the way before the token is routed. The routed
    # expert's decode much and come next, while more of the shared one's keep memory busy.
    program = tl.program_id(0)
    routed_programs = inter // (8 * GROUPS)
    routed = program - FIRST
    if (routed < 0) | (routed >= routed_programs):
        program = tl.where(routed < 0, program, program - routed_programs)
        STEPS: tl.constexpr = (DEPTH // 512 + WARPS - 1) // WARPS
        pair = tl.arange(0, 2 * OUTPUTS)
        outputs = program * OUTPUTS + pair // 2
        inside = outputs < shared_inter
        rows = outputs + pair % 2 * shared_inter
        tiles = ()
        for i in tl.static_range(STEPS):
            tiles = tiles + (load_fp8_tile(shared_ptr, rows, inside, i, DEPTH, WARPS),)
        scale = tl.load(shared_scale_ptr + rows, mask=inside, other=0.0)
        wait_for_inputs(OVERLAP)
        acc = tl.zeros((2 * OUTPUTS, 64 * WARPS), tl.float32)
        for i in tl.static_range(STEPS):
            acc = add_fp8_tile(acc, tiles[i], x_ptr, i, DEPTH, WARPS, ASM)
        gate, up = tl.split(tl.reshape(sum_fp8_rows(acc) * scale, (OUTPUTS, 2)))
        outputs = program * OUTPUTS + tl.arange(0, OUTPUTS)
        out = swiglu_rounded(gate, up, DTYPE).to(tl.float32)
        tl.store(shared_out_ptr + plane_place(outputs), out, mask=outputs < shared_inter)
    else:
        group = routed * GROUPS
        w_scale = tl.load(w_scale_ptr) * SHIFT
        wait_for_inputs(OVERLAP)
        expert = tl.load(id_ptr)
        if expert >= 0:
            CHUNKS: tl.constexpr = DEPTH // 512
            blocks = inter.to(tl.int64) * (2 * DEPTH // 16)
            w_ptr += expert * blocks
            s_ptr += expert * (blocks // 8)
            words, scales = load_expert_chunk(w_ptr, s_ptr, group, 0, CHUNKS, None, CHUNKS, GROUPS, WARPS)
            sums = (tl.zeros((2, 2, 64 * WARPS), tl.float32), tl.zeros((2, 2, 64 * WARPS), tl.float32))
            for step in tl.range(0, CHUNKS, WARPS // GROUPS):
                # The next chunk is on its way while this one is multiplied.
                step = step // (WARPS // GROUPS)
                further, further_scales = load_expert_chunk(
                    w_ptr, s_ptr, group, step + 1, CHUNKS, None, CHUNKS, GROUPS, WARPS
                )
                sums = add_expert_chunk(
                    sums, words, scales, half_ptr, half_scale_ptr, step, None, CHUNKS, GROUPS, WARPS, ASM
                )
                words, scales = further, further_scales
            gate = sum_expert_rows(sums[0], GROUPS, WARPS) * w_scale
            out = swiglu_rounded(gate, sum_expert_rows(sums[1], GROUPS, WARPS) * w_scale, DTYPE)
            store_half_blocks(out_ptr, out_scale_ptr, group * 8, out.to(tl.float32), inter, 8 * GROUPS)


@triton.jit
def _one_down_kernel(
    half_ptr,
    half_scale_ptr,
    shared_x_ptr,
    id_ptr,
    w_ptr,
    s_ptr,
    w_scale_ptr,
    shared_ptr,
    shared_scale_ptr,
    out_ptr,
    size,
    DEPTH: tl.constexpr,
    SHARED_DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
    SHIFT: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Both products of 8 outputs. The shared expert's first columns are on the way before its input is there.
    STEPS: tl.constexpr = (SHARED_DEPTH // 512 + WARPS - 1) // WARPS
    program = tl.program_id(0)
    outputs = program * 8 + tl.arange(0, 8)
    inside = outputs < size
    CHUNKS: tl.constexpr = DEPTH // 512
    tile = load_fp8_tile(shared_ptr, outputs, inside, 0, SHARED_DEPTH, WARPS)
    shared_scale = tl.load(shared_scale_ptr + outputs, mask=inside, other=0.0)
    w_scale = tl.load(w_scale_ptr) * SHIFT
    wait_for_inputs(OVERLAP)
    expert = tl.load(id_ptr)  # -1: another rank's
    limit = tl.where(expert >= 0, CHUNKS, 0)
    blocks = tl.maximum(expert, 0) * (size.to(tl.int64) * (DEPTH // 16))
    w_ptr += blocks
    s_ptr += blocks // 8
    group, which = program // 2, program % 2
    words, scales = load_expert_chunk(w_ptr, s_ptr, group, 0, limit, which, CHUNKS, 1, WARPS)
    acc = tl.zeros((8, 64 * WARPS), tl.float32)
    for step in tl.range(0, STEPS):
        further = load_fp8_tile(shared_ptr, outputs, inside, step + 1, SHARED_DEPTH, WARPS)
        acc = add_fp8_tile(acc, tile, shared_x_ptr, step, SHARED_DEPTH, WARPS, ASM)
        tile = further
    shared = sum_fp8_rows(acc) * shared_scale
    own = tl.zeros((8,), tl.float32)
    if expert >= 0:
        sums = (tl.zeros((2, 2, 64 * WARPS), tl.float32),)
        for step in tl.range(0, CHUNKS, WARPS):
            step = step // WARPS
            further, further_scales = load_expert_chunk(
                w_ptr, s_ptr, group, step + 1, limit, which, CHUNKS, 1, WARPS
            )
            sums = add_expert_chunk(
                sums, words, scales, half_ptr, half_scale_ptr, step, which, CHUNKS, 1, WARPS, ASM
            )
            words, scales = further, further_scales
        own = sum_expert_rows(sums[0], 1, WARPS) * w_scale
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = own.to(dtype).to(tl.float32) + shared.to(dtype).to(tl.float32)
    tl.store(out_ptr + outputs, total.to(dtype), mask=inside)


_POINTERS = {
    "half_ptr": "*i64",
    "half_scale_ptr": "*fp32",
    "id_ptr": "*i32",
    "w_ptr": "*i64",
    "s_ptr": "*i64",
    "w_scale_ptr": "*fp32",
    "shared_ptr": "*i64",
    "shared_scale_ptr": "*fp32",
}
_UP = {**_POINTERS, "x_ptr": "*fp32", "out_ptr": "*fp16", "out_scale_ptr": "*fp32", "shared_out_ptr": "*fp32"}
_DOWN = {**_POINTERS, "shared_x_ptr": "*fp32", "out_ptr": "*bf16"}
_COMMON = {"SHIFT": float(1 << SCALE_SHIFT), "ASM": True, "OVERLAP": True}


def _aot_specs(tile: OneTile):
    """(kernel, signature, constants, options, aligned arguments) of both products."""
    up = _COMMON | {"DEPTH": 5120, "OUTPUTS": tile.outputs, "GROUPS": tile.groups, "FIRST": tile.first}
    up |= {"WARPS": tile.up_warps, "DTYPE": tl.bfloat16}
    down = _COMMON | {"DEPTH": 8192, "SHARED_DEPTH": 8192, "WARPS": tile.down_warps}
    up_sizes, down_sizes = {"inter": "i32", "shared_inter": "i32"}, {"size": "i32"}
    down_options = {"num_warps": tile.down_warps, "maxnreg": tile.down_registers}
    return [
        (_one_gate_up_kernel, _UP | up_sizes, up, {"num_warps": tile.up_warps}, (*_UP, *up_sizes)),
        (_one_down_kernel, _DOWN | down_sizes, down, down_options, (*_DOWN, *down_sizes)),
    ]


AOT_SPECS = _aot_specs(ONE_TILE)
