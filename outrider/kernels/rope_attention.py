"""Rope, cache store and decode attention in one launch, for the smallest steps.

Called by the attention layer for steps of one decode, where a launch more costs a third of the attention. A program
loads its part of the cache while the product before still runs; then it turns its own query heads, and the new key if
its part of the context ends with it. The floor is reading the context's keys and values once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import arrival_counters, num_sms, on_gpu
from outrider.kernels.attention import paged_attention_reference
from outrider.kernels.attention_decode import (
    FP8,
    LOG2_E,
    DecodeTile,
    compute_dtype,
    load_kv,
    pick_num_splits,
)
from outrider.kernels.attention_merge import merge_group, split_bounds
from outrider.kernels.invariant import is_invariant
from outrider.kernels.overlap import overlap_options, wait_for_inputs
from outrider.kernels.quantize import to_fp8
from outrider.kernels.rope import RopeSpec, load_pairs, qkv_rope_store_reference, turn_pairs

TILE = DecodeTile(num_stages=1, programs_per_sm=2, merge_at_once=16)
"""Launch constants.

H200, 2026-11-26, one sequence of 1,100 tokens: 7.1 us instead of 9.8 in two launches, of 8,192 tokens 16 instead of
22, a whole layer 88.0 instead of 90.7. Eight warps: 25 to 34 us at 8,192 tokens.
"""

MOST_SEQS = 1
"""Rows of a step. H200, 2026-11-26, a whole layer of 4 rows: 187.6 instead of 190.2 us, of 16: 372 instead of 361."""

MOST_CONTEXT = 16384
"""Visible tokens; a graph is made for the most that the server allows, whatever a step holds.

Each program loads one tile ahead: at 100,000 tokens two launches take 77 us and this one 119 (H200, 2026-11-26).
"""


def rope_attention_takes(
    qkv: torch.Tensor, num_decodes: int, max_seq_len: int, chunk_size: int | None
) -> bool:
    """Whether a step whose rows are ``qkv`` and whose first ``num_decodes`` are decodes goes through here."""
    num_tokens, visible = qkv.shape[0], min(max_seq_len, chunk_size or max_seq_len)
    is_small = 0 < num_tokens == num_decodes <= MOST_SEQS and visible <= MOST_CONTEXT
    return is_small and on_gpu(qkv) and not is_invariant()


def rope_attention_reference(
    qkv: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of ``rope_attention``, composed of the references of the two ops that it replaces."""
    positions = (seq_lens.long() - 1).clamp(min=0)
    q = qkv_rope_store_reference(qkv, positions, spec, k_cache, v_cache, slots, k_scale, v_scale)
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=qkv.device)
    return paged_attention_reference(
        q, k_cache, v_cache, block_tables, starts, seq_lens, len(seq_lens), 1, max_seq_len,
        sm_scale, chunk_size, k_scale, v_scale, out_scale,
    )  # fmt: skip


@triton.jit
def _as_stored(x, scale, COMPUTE: tl.constexpr, STORED: tl.constexpr):
    """``x`` as the cache keeps it, and that value as the products take it."""
    stored = to_fp8(x, scale) if tl.float8e4nv == STORED else x.to(STORED)
    return stored, stored.to(COMPUTE)


@triton.jit
def _join_pairs(a, b, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """``[R, D]`` of what ``load_pairs`` took apart."""
    both = tl.join(a, b)
    if not INTERLEAVED:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, [a.shape[0], D])


@triton.jit(do_not_specialize=("table_stride", "num_splits"))
def _rope_decode_kernel(
    qkv_ptr,
    inv_freq_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    tables_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    arrivals_ptr,
    qkv_stride,
    block_stride,
    head_stride,
    table_stride,
    num_splits,
    norm_eps,
    floor_scale,
    attn_scale,
    k_scale,
    v_scale,
    score_scale,
    out_scale_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    MERGE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Everything that is read before the wait was written by earlier steps or by the host.
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TURNED: tl.constexpr = triton.next_power_of_2(GROUP)
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq)
    begin, first, end, per_split = split_bounds(length, num_splits, CHUNK, TILE)
    num_used = tl.maximum(tl.cdiv(end - first, per_split), 1)
    if split >= num_used:
        return
    first += split * per_split
    end = tl.minimum(end, first + per_split)
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    k_rows = k_ptr + kv_head.to(tl.int64) * head_stride
    v_rows = v_ptr + kv_head.to(tl.int64) * head_stride
    old = length - 1
    next_k = load_kv(k_rows, table_ptr, first * TILE, old, block_stride, BLOCK_SIZE, TILE, D).to(COMPUTE)
    next_v = load_kv(v_rows, table_ptr, first * TILE, old, block_stride, BLOCK_SIZE, TILE, D).to(COMPUTE)
    position = old.to(tl.float32)
    cos = 1.0
    sin = 0.0
    if ROTATE:
        angles = position * tl.load(inv_freq_ptr + tl.arange(0, D // 2))
        cos = tl.cos(angles)
        sin = tl.sin(angles)
    slot = tl.load(slots_ptr + seq)
    dims = tl.arange(0, D)
    rows = tl.arange(0, 16)
    one = tl.arange(0, 1)
    wait_for_inputs(OVERLAP)

    qkv_ptr += seq.to(tl.int64) * qkv_stride
    turned = tl.arange(0, TURNED)
    q_heads = qkv_ptr + (kv_head * GROUP + turned)[:, None] * D
    k_head = qkv_ptr + (HEADS + kv_head + one)[:, None] * D
    q_first, q_second = load_pairs(q_heads, (turned < GROUP)[:, None], D, INTERLEAVED)
    k_first, k_second = load_pairs(k_head, (one < 1)[:, None], D, INTERLEAVED)
    v_new = tl.load(k_head + KV_HEADS * D + dims[None, :])
    a, b = turn_pairs(
        q_first, q_second, turned >= 0, turned < 0, position, cos, sin, norm_eps, floor_scale, attn_scale,
        D, ROTATE, NORM, TEMPERATURE,
    )  # fmt: skip
    q = _join_pairs(a, b, D, INTERLEAVED).to(qkv_ptr.dtype.element_ty)
    if tl.float16 == COMPUTE:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
    q = tl.reshape(tl.broadcast_to(q.to(COMPUTE)[None], [16 // TURNED, TURNED, D]), [16, D])
    a, b = turn_pairs(
        k_first, k_second, one < 0, one < 0, position, cos, sin, norm_eps, floor_scale, attn_scale,
        D, ROTATE, NORM, TEMPERATURE,
    )  # fmt: skip
    STORED: tl.constexpr = k_ptr.dtype.element_ty
    k_stored, k_new = _as_stored(_join_pairs(a, b, D, INTERLEAVED), k_scale, COMPUTE, STORED)
    v_stored, v_new = _as_stored(v_new.to(tl.float32), v_scale, COMPUTE, STORED)

    # The softmax of the program that holds the context's end starts with the new token.
    holds_new = (length > 0) & (end * TILE >= length)
    new_score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1)
    best = tl.where(holds_new, new_score, float("-inf"))
    total = tl.where(holds_new, 1.0, 0.0) + tl.zeros([16], tl.float32)
    acc = tl.where(holds_new, v_new.to(tl.float32), 0.0) + tl.zeros([16, D], tl.float32)
    for tile in tl.range(first, end):
        k = next_k
        v = next_v
        if tile + 1 < end:
            start = (tile + 1) * TILE
            next_k = load_kv(k_rows, table_ptr, start, old, block_stride, BLOCK_SIZE, TILE, D).to(COMPUTE)
            next_v = load_kv(v_rows, table_ptr, start, old, block_stride, BLOCK_SIZE, TILE, D).to(COMPUTE)
        tokens = tile * TILE + tl.arange(0, TILE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(((tokens >= begin) & (tokens < old))[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2((best - new_best) * score_scale)
        probs = tl.exp2(scores * score_scale - (new_best * score_scale)[:, None])
        total = total * shrink + tl.sum(probs, 1)
        acc = tl.dot(probs.to(COMPUTE), v, acc * shrink[:, None], input_precision="ieee")
        best = new_best

    group = (seq.to(tl.int64) * KV_HEADS + kv_head) * GROUP
    place = (group + rows) * num_splits + split
    tl.store(lse_ptr + place, best * score_scale + tl.log2(total), mask=rows < GROUP)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial_ptr + place[:, None] * D + dims[None, :], acc, mask=(rows < GROUP)[:, None])
    tl.debug_barrier()
    arrivals = arrivals_ptr + seq * KV_HEADS + kv_head
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_used - 1:
        tl.store(arrivals, 0)
        merge_group(
            partial_ptr, lse_ptr, out_ptr, group, num_used, num_splits, v_scale, out_scale_ptr,
            MERGE, GROUP, D, qkv_ptr.dtype.element_ty, QUANTIZE,
        )  # fmt: skip
    if holds_new:
        cell = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * D + dims[None, :]
        tl.store(k_rows + cell, k_stored)
        tl.store(v_rows + cell, v_stored)


def rope_attention(
    qkv: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out_scale: torch.Tensor | None = None,
    tile: DecodeTile | None = None,
) -> torch.Tensor:
    """``qkv_rope_store`` and ``paged_attention`` of a step of decodes: ``qkv [S, (H + 2K) * D]`` to ``[S, H * D]``.

    The new token of a sequence has position ``seq_len - 1``; a sequence of length 0 is padding: nothing is stored and
    its row is zeros. Other arguments as in the two ops; no sequence may read another's slot of this step. ``tile``
    overrides ``TILE``.
    """
    num_seqs, heads, kv_heads, head_dim = len(seq_lens), spec.num_heads, spec.num_kv_heads, spec.head_dim
    tile = tile or TILE
    visible = min(max_seq_len, chunk_size) if chunk_size else max_seq_len
    num_splits = pick_num_splits(num_seqs, kv_heads, visible, num_sms(qkv.device), tile)
    device = qkv.device
    out = torch.empty(
        (num_seqs, heads * head_dim), dtype=qkv.dtype if out_scale is None else FP8, device=device
    )
    partial = torch.empty((num_seqs, heads, num_splits, head_dim), dtype=torch.float32, device=device)
    lse = torch.empty((num_seqs, heads, num_splits), dtype=torch.float32, device=device)
    if k_cache.dtype != FP8:
        k_scale = v_scale = 1.0
    floor_scale, attn_scale = spec.temperature or (1.0, 0.0)
    _rope_decode_kernel[(kv_heads, num_seqs, num_splits)](
        qkv,
        spec.inv_freq,
        k_cache,
        v_cache,
        slots,
        block_tables,
        seq_lens,
        out,
        partial,
        lse,
        arrival_counters(device),
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        block_tables.stride(0),
        num_splits,
        spec.qk_norm_eps or 0.0,
        floor_scale,
        attn_scale,
        k_scale,
        v_scale,
        sm_scale * k_scale * LOG2_E,
        out_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        TILE=tile.tokens,
        CHUNK=chunk_size or 0,
        COMPUTE=compute_dtype(qkv, k_cache),
        MERGE=tile.merge_at_once,
        QUANTIZE=out_scale is not None,
        ROTATE=spec.inv_freq is not None,
        INTERLEAVED=spec.interleaved,
        NORM=spec.qk_norm_eps is not None,
        TEMPERATURE=spec.temperature is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(device, num_seqs),
    )
    return out


_POINTERS = {
    "qkv_ptr": "*bf16",
    "inv_freq_ptr": "*fp32",
    "k_ptr": "*fp8e4nv",
    "v_ptr": "*fp8e4nv",
    "slots_ptr": "*i64",
    "tables_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "out_ptr": "*fp8e4nv",
    "partial_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "arrivals_ptr": "*i32",
    "out_scale_ptr": "*fp32",
}
_STRIDES = dict.fromkeys(("qkv_stride", "block_stride", "head_stride", "table_stride", "num_splits"), "i32")
_NUMBERS = dict.fromkeys(
    ("norm_eps", "floor_scale", "attn_scale", "k_scale", "v_scale", "score_scale"), "fp32"
)


def _aot_spec(tile: DecodeTile, rotate: bool):
    constants = {
        "HEADS": 40,
        "KV_HEADS": 8,
        "D": 128,
        "BLOCK_SIZE": 64,
        "TILE": tile.tokens,
        "CHUNK": 8192 if rotate else 0,
        "COMPUTE": tl.float16,
        "MERGE": tile.merge_at_once,
        "QUANTIZE": True,
        "ROTATE": rotate,
        "INTERLEAVED": True,
        "NORM": rotate,
        "TEMPERATURE": not rotate,
        "OVERLAP": True,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    aligned = (
        "qkv_ptr",
        "k_ptr",
        "v_ptr",
        "out_ptr",
        "partial_ptr",
        "qkv_stride",
        "block_stride",
        "head_stride",
    )
    return _rope_decode_kernel, {**_POINTERS, **_STRIDES, **_NUMBERS}, constants, options, aligned


AOT_SPECS = [_aot_spec(TILE, rotate) for rotate in (True, False)]
