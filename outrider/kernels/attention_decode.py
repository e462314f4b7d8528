"""Decode attention on the GPU: one query a sequence, keys and values read once, split over programs.

Called by ``attention`` only. One program takes the query heads of one kv head (padded to 16 rows for the matrix
units) and one split of the sequence's context; the last of them, or a second kernel, merges the splits. Their number
follows host integers, their bounds follow ``seq_lens`` on the device: the same launch serves any lengths, so it can
be captured in a CUDA graph. The floor is reading the context's keys and values once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import arrival_counters, ceil_div, interpreted, num_sms, power_of_two_at_least
from outrider.kernels.attention_merge import _merge_kernel, merge_group, split_bounds, store_rows
from outrider.kernels.overlap import overlap_options, wait_for_inputs

LOG2_E = 1.4426950408889634
MAX_GROUP = 16
"""Most query heads of a kv head: the rows of one matrix product."""
FP8 = torch.float8_e4m3fn
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class DecodeTile(NamedTuple):
    """Launch constants: tokens a step of the loop reads, warps, pipeline depth, programs wanted for each SM.

    H200, 2026-11-27, 8 kv heads of 128 in FP8 under load: 512 x 1,536 tokens in 404 us = 4.0 TB/s (4 stages 432, 3
    stages 443, any number of registers 421, copies by every thread 438), 405 x 1,750 358 us (394), 240 x 1,500 191 us
    (206), 110 x 1,400 100 us (106), 17 x 8,000 89 us (96); 240 x 1,500 with 16 programs for each SM 5 % more:
    trials_h200.txt.
    """

    tokens: int = 64
    num_warps: int = 4
    num_stages: int = 5
    programs_per_sm: int = 8
    merge_at_once: int = 0
    """Splits that the last program of a kv head merges at a time; 0: a kernel of its own merges them."""
    registers: int | None = 96
    """Most of a thread where the copy engine is used: with 96 five programs of four warps share a multiprocessor."""


SMALL_STEP_TILES = (
    (1, DecodeTile(programs_per_sm=4, merge_at_once=8, registers=None)),
    (16, DecodeTile(programs_per_sm=2, merge_at_once=16, registers=None)),
)
"""(most sequences, tile).

H200, 2026-11-26, a whole layer of 16 tokens 384.6 us, with a kernel of its own for merging 391:
benchmarks/results/kernels_few_h200.json
"""

MAX_SPLITS = 64
SMALL_CONTEXT_TOKENS = 64
"""No split is made shorter than this."""
MERGE_WARPS = 2
"""Of the kernel that merges splits.

These three are not tuned. H200, 2026-11-27, one sequence of 1,024 / 32,768 / 131,072 tokens: 7.2 / 28.7 / 80.5 us, at
7 / 55 / 78 % of a copy's speed: benchmarks/results/kernels_h200.json
"""


@triton.jit
def load_kv(
    ptr, table_ptr, start, end, block_stride, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr
):
    """Tokens ``[start, start + TILE)`` of one kv head as ``[TILE, D]``; zeros from ``end`` on, whatever lies there."""
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, D)
    if BLOCK_SIZE >= TILE:
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        offsets = block * block_stride + (start % BLOCK_SIZE + rows)[:, None] * D + dims[None, :]
    else:
        tokens = start + rows
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)
        offsets = (blocks * block_stride + (tokens % BLOCK_SIZE) * D)[:, None] + dims[None, :]
    return tl.load(ptr + offsets, mask=((start + rows) < end)[:, None], other=0.0)


@triton.jit
def _fold(state, q, k, v, visible, score_scale, PAIRS: tl.constexpr, MASKED: tl.constexpr):
    """The running softmax ``(acc, acc_odd, best, total)`` after a tile of keys and values; see ``_decode_kernel``."""
    acc, acc_odd, best, total = state
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    shrink = tl.exp2((best - new_best) * score_scale)
    probs = tl.exp2(scores * score_scale - (new_best * score_scale)[:, None])
    total = total * shrink + tl.sum(probs, 1)
    probs = probs.to(q.dtype)
    if PAIRS:
        low = v.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(q.dtype)
        high = (v >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(q.dtype)
        acc = tl.dot(probs, low, acc * shrink[:, None])
        acc_odd = tl.dot(probs, high, acc_odd * shrink[:, None])
    else:
        acc = tl.dot(probs, v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, acc_odd, new_best, total


@triton.jit(do_not_specialize=("table_stride", "num_splits"))
def _decode_kernel(
    q_ptr,
    k_desc,
    v_desc,
    k_ptr,
    v_ptr,
    tables_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrivals_ptr,
    q_stride,
    block_stride,
    head_stride,
    table_stride,
    num_splits,
    score_scale,
    v_scale,
    out_scale_ptr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # With MERGE the last program of a kv head to arrive merges its splits, so many at once: always in their order.
    # With descriptors the copy engine reads the tiles that are visible as a whole, which takes no thread's time; it
    # cannot leave out what lies behind the last token, a NaN perhaps.
    wait_for_inputs(OVERLAP)
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq)
    begin, first, end, per_split = split_bounds(length, num_splits, CHUNK, TILE)
    num_used = tl.maximum(tl.cdiv(end - first, per_split), 1)
    if SPLIT and split >= num_used:
        return
    first += split * per_split
    end = tl.minimum(end, first + per_split)
    rows = tl.arange(0, 16)
    dims = tl.arange(0, D)
    head = kv_head * GROUP + rows
    in_group = (rows < GROUP)[:, None]
    q = tl.load(
        q_ptr + seq.to(tl.int64) * q_stride + head[:, None] * D + dims[None, :], mask=in_group, other=0.0
    )
    if tl.float16 == COMPUTE:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
    q = q.to(COMPUTE)
    k_ptr += kv_head.to(tl.int64) * head_stride
    v_ptr += kv_head.to(tl.int64) * head_stride
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride

    best = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    # FP8 values are read as pairs of 16 bits: the matrix units want two tokens side by side, a transposition that
    # shared memory offers for 16-bit elements only. Even and odd dimensions then have a product each.
    PAIRS: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    WIDTH: tl.constexpr = D // 2 if PAIRS else D
    acc = tl.zeros([16, WIDTH], tl.float32)
    acc_odd = tl.zeros([16, WIDTH], tl.float32)
    state = (acc, acc_odd, best, total)
    if PAIRS:
        v_ptr = v_ptr.to(tl.pointer_type(tl.int16))
        v_stride = block_stride // 2
    else:
        v_stride = block_stride
    if k_desc is not None:
        whole = tl.minimum(end, tl.maximum(length // TILE, first))
        for tile in tl.range(first, whole):
            start = tile * TILE
            row = tl.load(table_ptr + start // BLOCK_SIZE) * (block_stride // D) + start % BLOCK_SIZE
            row += kv_head * (head_stride // D)
            k = k_desc.load([row, 0])
            v = v_desc.load([row, 0])
            state = _fold(state, q, k, v, None, score_scale, PAIRS, False)
        first = whole
    # Behind descriptors this is one tile or none.
    for tile in tl.range(first, end, num_stages=1 if k_desc is not None else None):
        start = tile * TILE
        tokens = start + tl.arange(0, TILE)
        visible = (tokens >= begin) & (tokens < length)
        k = load_kv(k_ptr, table_ptr, start, length, block_stride, BLOCK_SIZE, TILE, D)
        v = load_kv(v_ptr, table_ptr, start, length, v_stride, BLOCK_SIZE, TILE, WIDTH)
        state = _fold(state, q, k, v, visible, score_scale, PAIRS, True)
    acc, acc_odd, best, total = state
    if PAIRS:
        acc = tl.reshape(tl.join(acc, acc_odd), [16, D])
    group = (seq.to(tl.int64) * tl.num_programs(0) + kv_head) * GROUP
    model_dtype: tl.constexpr = q_ptr.dtype.element_ty
    if SPLIT:
        place = (group + rows) * num_splits + split
        tl.store(lse_ptr + place, best * score_scale + tl.log2(total), mask=rows < GROUP)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(partial_ptr + place[:, None] * D + dims[None, :], acc, mask=in_group)
        if MERGE:
            tl.debug_barrier()
            arrivals = arrivals_ptr + seq * tl.num_programs(0) + kv_head
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_used - 1:
                tl.store(arrivals, 0)
                merge_group(
                    partial_ptr, lse_ptr, out_ptr, group, num_used, num_splits, v_scale, out_scale_ptr,
                    MERGE, GROUP, D, model_dtype, QUANTIZE,
                )  # fmt: skip
    else:
        acc = acc * tl.where(total > 0, v_scale / total, 0.0)[:, None]
        out_ptrs = out_ptr + (group + rows)[:, None] * D + dims[None, :]
        store_rows(out_ptrs, acc, in_group, out_scale_ptr, model_dtype, QUANTIZE)


def compute_dtype(q: torch.Tensor, cache: torch.Tensor) -> tl.dtype:
    """The matrix units' operand type: an FP8 cache's values are exact in float16, which also holds
    probabilities more finely than bfloat16. The interpreter multiplies no bfloat16."""
    if cache.dtype == FP8:
        return tl.float16
    if q.dtype == torch.bfloat16:
        return tl.float32 if interpreted() else tl.bfloat16
    return tl.float32


def pick_num_splits(num_seqs: int, kv_heads: int, max_seq_len: int, sms: int, tile: DecodeTile) -> int:
    """Enough splits that the grid fills the device several times over, none below the smallest context."""
    wanted = ceil_div(sms * tile.programs_per_sm, num_seqs * kv_heads)
    return max(1, min(wanted, ceil_div(max_seq_len, SMALL_CONTEXT_TOKENS), MAX_SPLITS))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
    tile: DecodeTile | None = None,
    num_splits: int | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Fill ``out [S, H * D]`` for ``q [S, H, D]``, one row a sequence; arguments as in ``paged_attention``."""
    num_seqs, num_heads, head_dim = q.shape
    tile = tile or next((t for most, t in SMALL_STEP_TILES if num_seqs <= most), DecodeTile())
    _, kv_heads, block_size, _ = k_cache.shape
    if num_splits is None:
        visible = min(max_seq_len, chunk_size) if chunk_size else max_seq_len
        num_splits = pick_num_splits(num_seqs, kv_heads, visible, num_sms(q.device), tile)
    partial = lse = None
    if num_splits > 1:
        partial = torch.empty(
            (num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device
        )
        lse = torch.empty((num_seqs, num_heads, num_splits), dtype=torch.float32, device=q.device)
    merge = tile.merge_at_once if num_splits > 1 else 0
    scales = (k_scale, v_scale) if k_cache.dtype == FP8 else (1.0, 1.0)
    chunk = chunk_size or 0
    k_desc, v_desc = _descriptors(k_cache, v_cache, tile.tokens, chunk)
    _decode_kernel[(kv_heads, num_seqs, num_splits)](
        q,
        k_desc,
        v_desc,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        out,
        partial,
        lse,
        arrival_counters(q.device) if merge else None,
        q.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        block_tables.stride(0),
        num_splits,
        sm_scale * scales[0] * LOG2_E,
        scales[1],
        out_scale,
        GROUP=num_heads // kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tile.tokens,
        CHUNK=chunk,
        COMPUTE=compute_dtype(q, k_cache),
        SPLIT=num_splits > 1,
        MERGE=merge,
        QUANTIZE=out_scale is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers if k_desc is not None else None,
        **overlap_options(q.device, num_seqs),
    )
    if num_splits > 1 and not merge:
        _merge_kernel[(num_heads, num_seqs)](
            partial, lse, seq_lens, out, num_splits, scales[1], out_scale,
            D=head_dim, TILE=tile.tokens, CHUNK=chunk, SPLITS=power_of_two_at_least(num_splits, 2),
            MODEL_DTYPE=TRITON_DTYPES[q.dtype], QUANTIZE=out_scale is not None, num_warps=MERGE_WARPS,
        **overlap_options(q.device, num_seqs),
    )  # fmt: skip


def _descriptors(
    k_cache: torch.Tensor, v_cache: torch.Tensor, tokens: int, chunk: int
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """An FP8 cache as rows of one kv head's keys, and of its values in pairs, for the copy engine.

    None where tiles of ``tokens`` cross the border of a block or of a chunk of tokens that see each other.
    """
    num_blocks, kv_heads, block_size, head_dim = k_cache.shape
    strides = k_cache.stride()[:2]
    divisible = all(size % tokens == 0 for size in (block_size, chunk)) and all(
        stride % head_dim == 0 for stride in strides
    )
    last = (num_blocks - 1) * strides[0] + (kv_heads - 1) * strides[1]
    size = (last // head_dim + block_size, head_dim)
    if k_cache.dtype != FP8 or not divisible or size[0] >= 1 << 31:
        return None, None
    k_rows, v_rows = (cache.as_strided(size, (head_dim, 1)) for cache in (k_cache, v_cache))
    return (
        TensorDescriptor.from_tensor(k_rows, [tokens, head_dim]),
        TensorDescriptor.from_tensor(v_rows.view(torch.int16), [tokens, head_dim // 2]),
    )


_POINTERS = {
    "q_ptr": "*bf16",
    "k_desc": "tensordesc<fp8e4nv[64, 128]>",
    "v_desc": "tensordesc<i16[64, 64]>",
    "k_ptr": "*fp8e4nv",
    "v_ptr": "*fp8e4nv",
    "tables_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "out_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}
_NUMBERS = {
    "q_stride": "i32",
    "block_stride": "i32",
    "head_stride": "i32",
    "table_stride": "i32",
    "num_splits": "i32",
    "score_scale": "fp32",
    "v_scale": "fp32",
    "out_scale_ptr": "*fp32",
}
_QUANTIZED = {**_POINTERS, **_NUMBERS, "out_ptr": "*fp8e4nv"}
_SHAPE = {"GROUP": 5, "D": 128, "BLOCK_SIZE": 64, "TILE": 64, "COMPUTE": tl.float16, "OVERLAP": True}
_OPTIONS = {
    "num_warps": DecodeTile().num_warps,
    "num_stages": DecodeTile().num_stages,
    "maxnreg": DecodeTile().registers,
}
AOT_SPECS = [
    (
        _decode_kernel,
        {**_POINTERS, **_NUMBERS},
        {**_SHAPE, "CHUNK": 8192, "SPLIT": True, "MERGE": 0, "QUANTIZE": False},
        _OPTIONS,
    ),
    (
        _decode_kernel,
        _QUANTIZED,
        {**_SHAPE, "CHUNK": 0, "SPLIT": False, "MERGE": 0, "QUANTIZE": True},
        _OPTIONS,
    ),
    (
        _decode_kernel,
        _QUANTIZED,
        {**_SHAPE, "CHUNK": 0, "SPLIT": True, "MERGE": 16, "QUANTIZE": True},
        _OPTIONS,
    ),
]
