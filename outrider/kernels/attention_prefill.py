"""Prefill attention on the GPU: ragged queries over the paged cache, in the manner of FlashAttention-2.

Called by ``attention`` only. The query heads of one kv head are packed into the rows of one tile, so that every
key tile serves the whole group; tiles of all sequences form one flat grid whose size follows host integers, and a
program finds its sequence by bisection in ``query_start``. The latest (longest) tiles start first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from outrider.kernels.attention_decode import FP8, LOG2_E, compute_dtype, load_kv
from outrider.kernels.attention_merge import store_rows


class PrefillTile(NamedTuple):
    """Launch constants: packed query rows of a program, tokens a step of its loop reads, warps, pipeline depth."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


PREFILL_TILES = ((768, PrefillTile(64, 64, 4, 1)), (math.inf, PrefillTile(128, 64, 4, 2)))
"""(most prompt tokens of a step, tile).

H200, 2026-11-27, 40 query and 8 kv heads of 128: 8,192 tokens in 1.98 ms = 347 TFLOP/s (64 rows 2.46, 8 warps 2.43),
1,024 in 54.6 us (64 rows 54.4), 512 behind 512 in 43.2 us (128 rows 52.5): trials_h200.txt
"""


@triton.jit
def _attend(
    acc, best, total, q, positions, k_ptr, v_ptr, table_ptr, tile_first, tile_end, length, block_stride, score_scale,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold key tiles ``[tile_first, tile_end)`` into the running softmax; ``MASKED`` only at the borders."""
    for tile in tl.range(tile_first, tile_end):
        start = tile * TILE
        k = load_kv(k_ptr, table_ptr, start, length, block_stride, BLOCK_SIZE, TILE, D)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if MASKED:
            tokens = start + tl.arange(0, TILE)
            visible = tokens[None, :] <= positions[:, None]
            if CHUNK > 0:
                visible = visible & ((tokens // CHUNK)[None, :] == (positions // CHUNK)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        origin = tl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
        shrink = tl.exp2((best - origin) * score_scale)
        probs = tl.exp2(scores * score_scale - (origin * score_scale)[:, None])
        total = total * shrink + tl.sum(probs, 1)
        v = load_kv(v_ptr, table_ptr, start, length, block_stride, BLOCK_SIZE, TILE, D)
        acc = tl.dot(probs.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        best = new_best
    return acc, best, total


@triton.jit
def _find_sequence(query_start_ptr, num_decodes, num_prefills, tile, QUERIES: tl.constexpr):
    """The last sequence whose first tile is at or before ``tile``, and that first tile."""
    low = 0
    high = num_prefills - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = (tl.load(query_start_ptr + num_decodes + middle) - num_decodes) // QUERIES + middle
        if first <= tile:
            low = middle
        else:
            high = middle - 1
    first = (tl.load(query_start_ptr + num_decodes + low) - num_decodes) // QUERIES + low
    return num_decodes + low, first


@triton.jit(do_not_specialize=("table_stride", "num_decodes", "num_prefills", "num_tokens"))
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    query_start_ptr,
    seq_lens_ptr,
    out_ptr,
    q_stride,
    block_stride,
    head_stride,
    table_stride,
    num_decodes,
    num_prefills,
    num_tokens,
    score_scale,
    v_scale,
    out_scale_ptr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first_tile = _find_sequence(query_start_ptr, num_decodes, num_prefills, tile, QUERIES)
    query_first = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - query_first
    first = (tile - first_tile) * QUERIES
    # Rows behind the last sequence are graph padding: they belong to its tiles and become zeros.
    num_owned = tl.where(seq == num_decodes + num_prefills - 1, num_tokens - query_first, num_queries)
    if first >= num_owned:
        return
    length = tl.load(seq_lens_ptr + seq)
    context = length - num_queries
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    query = first + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    in_tile = ((rows < QUERIES * GROUP) & (query < num_queries))[:, None]
    owned = ((rows < QUERIES * GROUP) & (query < num_owned))[:, None]
    place = (query_first + query).to(tl.int64)
    out_offsets = (place * (tl.num_programs(0) * GROUP) + head)[:, None] * D + dims[None, :]
    if first >= num_queries:
        zeros = tl.zeros([ROWS, D], tl.float32)
        tl.store(out_ptr + out_offsets, zeros.to(out_ptr.dtype.element_ty), mask=owned)
        return
    q_offsets = (place * q_stride + head * D)[:, None] + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=in_tile, other=0.0)
    if tl.float16 == COMPUTE:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
    q = q.to(COMPUTE)
    k_ptr += kv_head.to(tl.int64) * head_stride
    v_ptr += kv_head.to(tl.int64) * head_stride
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    low = context + first
    high = context + tl.minimum(first + QUERIES, num_queries) - 1
    positions = tl.minimum(context + query, high)
    begin = 0
    open_tile = 0
    if CHUNK > 0:
        begin = low // CHUNK * CHUNK // TILE
        open_tile = tl.cdiv(high // CHUNK * CHUNK, TILE)
    # Tiles [open_tile, diagonal) are visible to every row.
    end = high // TILE + 1
    diagonal = (low + 1) // TILE
    if CHUNK > 0:
        open_tile = tl.minimum(open_tile, end)
        diagonal = tl.maximum(diagonal, open_tile)
        acc, best, total = _attend(
            acc, best, total, q, positions, k_ptr, v_ptr, table_ptr, begin, open_tile, length, block_stride,
            score_scale, BLOCK_SIZE, TILE, D, CHUNK, True,
        )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q, positions, k_ptr, v_ptr, table_ptr, open_tile, diagonal, length, block_stride,
        score_scale, BLOCK_SIZE, TILE, D, CHUNK, False,
    )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q, positions, k_ptr, v_ptr, table_ptr, diagonal, end, length, block_stride,
        score_scale, BLOCK_SIZE, TILE, D, CHUNK, True,
    )  # fmt: skip
    acc = tl.where(in_tile, acc * (v_scale / total)[:, None], 0.0)
    store_rows(out_ptr + out_offsets, acc, owned, out_scale_ptr, q_ptr.dtype.element_ty, QUANTIZE)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    num_decodes: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
    tile: PrefillTile | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Fill ``out[num_decodes:]`` for ``q [T, H, D]``; arguments as in ``paged_attention``.

    Rows behind the last sequence (graph padding) become zeros.
    """
    num_tokens, num_heads, head_dim = q.shape
    tile = tile or next(t for most, t in PREFILL_TILES if num_tokens - num_decodes <= most)
    _, kv_heads, block_size, _ = k_cache.shape
    group = num_heads // kv_heads
    num_prefills = seq_lens.shape[0] - num_decodes
    # Each sequence wastes less than one tile: its first tile is floor(start / queries) + its index.
    num_tiles = (num_tokens - num_decodes) // (tile.rows // group) + num_prefills
    scales = (k_scale, v_scale) if k_cache.dtype == FP8 else (1.0, 1.0)
    _prefill_kernel[(kv_heads, num_tiles)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start,
        seq_lens,
        out,
        q.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        block_tables.stride(0),
        num_decodes,
        num_prefills,
        num_tokens,
        sm_scale * scales[0] * LOG2_E,
        scales[1],
        out_scale,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        TILE=tile.tokens,
        CHUNK=chunk_size or 0,
        COMPUTE=compute_dtype(q, k_cache),
        QUANTIZE=out_scale is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


_SIGNATURE = {
    "q_ptr": "*bf16",
    "k_ptr": "*fp8e4nv",
    "v_ptr": "*fp8e4nv",
    "tables_ptr": "*i32",
    "query_start_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "out_ptr": "*bf16",
    "q_stride": "i32",
    "block_stride": "i32",
    "head_stride": "i32",
    "table_stride": "i32",
    "num_decodes": "i32",
    "num_prefills": "i32",
    "num_tokens": "i32",
    "score_scale": "fp32",
    "v_scale": "fp32",
    "out_scale_ptr": "*fp32",
}
_QUANTIZED = {**_SIGNATURE, "out_ptr": "*fp8e4nv"}
_SHAPE = {"GROUP": 5, "D": 128, "BLOCK_SIZE": 64, "COMPUTE": tl.float16}


def _aot_spec(tile: PrefillTile, signature: dict[str, str], chunk: int):
    """(kernel, signature, constants, options) of one launch."""
    quantize = signature is _QUANTIZED
    constants = {**_SHAPE, "ROWS": tile.rows, "TILE": tile.tokens, "CHUNK": chunk, "QUANTIZE": quantize}
    return _prefill_kernel, signature, constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


AOT_SPECS = [
    _aot_spec(tile, signature, chunk)
    for _, tile in PREFILL_TILES
    for signature, chunk in ((_SIGNATURE, 0), (_QUANTIZED, 8192))
]
