"""The splits of decode attention become one row a head: inside the decode kernel, or in a kernel of their own.

Used by ``attention_decode`` and ``rope_attention``. A split leaves its softmax average ``[D]`` and the base-2 logarithm
of its mass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from outrider.kernels.overlap import wait_for_inputs
from outrider.kernels.quantize import to_fp8


@triton.jit
def store_rows(ptrs, x, mask, scale_ptr, MODEL_DTYPE: tl.constexpr, QUANTIZE: tl.constexpr):
    """Store float32 ``x`` in the model dtype, or that rounded value as e4m3 for the product that reads it."""
    if QUANTIZE:
        tl.store(ptrs, to_fp8(x.to(MODEL_DTYPE).to(tl.float32), tl.load(scale_ptr)), mask=mask)
    else:
        tl.store(ptrs, x.to(MODEL_DTYPE), mask=mask)


@triton.jit
def split_bounds(length, num_splits, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """First visible token, first tile, end tile, tiles a split: the same for the kernel and its merge."""
    begin = 0
    if CHUNK > 0:
        begin = tl.maximum(length - 1, 0) // CHUNK * CHUNK
    first = begin // TILE
    end = tl.cdiv(length, TILE)
    return begin, first, end, tl.maximum(tl.cdiv(end - first, num_splits), 1)


@triton.jit
def merge_group(
    partial_ptr, lse_ptr, out_ptr, group, num_used, num_splits, v_scale, out_scale_ptr,
    STEP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    MODEL_DTYPE: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of the ``GROUP`` heads from ``group`` on, ``STEP`` at a time and always in their order."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    rows = tl.arange(0, HEADS)
    dims = tl.arange(0, D)
    first = (group + rows) * num_splits
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for start in tl.range(0, num_used, STEP):
        splits = start + tl.arange(0, STEP)
        used = (rows < GROUP)[:, None] & (splits < num_used)[None, :]
        lse = tl.load(
            lse_ptr + first[:, None] + splits[None, :], mask=used, other=float("-inf"), cache_modifier=".cg"
        )
        new_best = tl.maximum(best, tl.max(lse, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(tl.exp2(lse - base[:, None]), 1)
        acc *= shrink[:, None]
        for i in tl.static_range(STEP):
            here = tl.where(start + i < num_used, rows, GROUP) < GROUP
            place = first + start + i
            mass = tl.load(lse_ptr + place, mask=here, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(
                partial_ptr + place[:, None] * D + dims[None, :],
                mask=here[:, None], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            acc += part * tl.exp2(mass - base)[:, None]
        best = new_best
    acc *= tl.where(total > 0, v_scale / total, 0.0)[:, None]
    out_ptrs = out_ptr + (group + rows)[:, None] * D + dims[None, :]
    store_rows(out_ptrs, acc, (rows < GROUP)[:, None], out_scale_ptr, MODEL_DTYPE, QUANTIZE)


@triton.jit(do_not_specialize=("num_splits",))
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    seq_lens_ptr,
    out_ptr,
    num_splits,
    v_scale,
    out_scale_ptr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    MODEL_DTYPE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program merges the splits of one head of one sequence; the weights are their softmax masses."""
    wait_for_inputs(OVERLAP)
    head, seq = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens_ptr + seq)
    _, first, end, per_split = split_bounds(length, num_splits, CHUNK, TILE)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    used = splits < tl.cdiv(end - first, per_split)
    row = seq.to(tl.int64) * tl.num_programs(0) + head
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=used, other=float("-inf"))
    best = tl.max(lse, 0)
    weight = tl.where(used, tl.exp2(lse - best), 0.0)
    place = (row * num_splits + splits)[:, None] * D + dims[None, :]
    partial = tl.load(partial_ptr + place, mask=used[:, None], other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(partial * weight[:, None], 0) * tl.where(total > 0, v_scale / total, 0.0)
    store_rows(out_ptr + row * D + dims, merged, dims < D, out_scale_ptr, MODEL_DTYPE, QUANTIZE)


_MERGE = {
    "partial_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "seq_lens_ptr": "*i32",
    "out_ptr": "*fp8e4nv",
    "num_splits": "i32",
    "v_scale": "fp32",
    "out_scale_ptr": "*fp32",
}
_MERGE_CONSTANTS = {
    "D": 128,
    "TILE": 64,
    "CHUNK": 0,
    "SPLITS": 64,
    "MODEL_DTYPE": tl.bfloat16,
    "OVERLAP": True,
}
AOT_SPECS = [(_merge_kernel, _MERGE, {**_MERGE_CONSTANTS, "QUANTIZE": True})]
