"""Attention over the paged KV cache: causal, grouped-query, whole context or one chunk of it.

Called once per layer, after ``rope`` has stored this step's keys and values. Sequences with one query token
(decodes) come first and take the split-KV kernel; the rest take the ragged prefill kernel. It never writes the
cache and never reads sizes from the device: the grids follow host integers, so a decode step can be captured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from outrider.kernels._dispatch import on_gpu
from outrider.kernels.attention_decode import DecodeTile, decode_attention
from outrider.kernels.attention_prefill import prefill_attention
from outrider.kernels.invariant import NUM_SPLITS, attend_each, is_invariant
from outrider.kernels.quantize import quantize_fp8_reference

TOKENS_AT_ONCE = 512
"""Tokens of one launch when each attends by itself; bounds the memory of the splits' partial results."""


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend ``q [T, H, D]`` to each sequence's cached tokens; return ``[T, H * D]`` in the dtype of ``q``.

    Caches: (strided) ``[num_blocks, K, block_size, D]`` in the dtype of ``q`` or float8_e4m3fn (value times scale).
    ``block_tables`` int32 ``[S, B]``; ``query_start`` int32 ``[S + 1]``; ``seq_lens`` int32 ``[S]`` counts the step's
    own tokens too, so the last query of a sequence has position ``seq_len - 1``. Key j is visible to query i iff
    ``j <= i`` and, with ``chunk_size``, ``j // chunk_size == i // chunk_size``. A decode of length 0 (graph padding)
    gives zeros. ``max_query_len`` and ``max_seq_len`` are upper bounds. Softmax in float32. With ``out_scale``
    (float32, one element) the result, rounded to the dtype of ``q``, comes back as ``e4m3(clamp(x / out_scale))``.
    """
    op = paged_attention_triton if on_gpu(q) else paged_attention_reference
    return op(
        q, k_cache, v_cache, block_tables, query_start, seq_lens, num_decodes,
        max_query_len, max_seq_len, sm_scale, chunk_size, k_scale, v_scale, out_scale,
    )  # fmt: skip


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of ``paged_attention`` in plain torch: the CPU path and the test oracle.

    All decodes share one call of ``scaled_dot_product_attention``; each prefill has its own.
    """
    cache = (k_cache, v_cache, k_scale, v_scale)
    lengths: list[int] = seq_lens.tolist()
    num_tokens, num_heads, head_dim = q.shape
    parts = []
    if is_invariant():
        parts = _each_alone(q, cache, block_tables, query_start.tolist(), lengths, sm_scale, chunk_size)
        num_decodes, lengths = 0, []
    if num_decodes:
        tables, lens = block_tables[:num_decodes], lengths[:num_decodes]
        parts.append(_decode(q[:num_decodes], cache, tables, lens, sm_scale, chunk_size))
    starts: list[int] = query_start.tolist() if num_decodes < len(lengths) else []
    for s in range(num_decodes, len(lengths)):
        rows = q[starts[s] : starts[s + 1]]
        if rows.shape[0]:
            parts.append(_prefill(rows, cache, block_tables[s], lengths[s], sm_scale, chunk_size))
    covered = sum(part.shape[0] for part in parts)
    if covered < num_tokens:  # padding behind the last sequence
        parts.append(q.new_zeros((num_tokens - covered, num_heads, head_dim)))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = out.reshape(num_tokens, num_heads * head_dim)
    return out if out_scale is None else quantize_fp8_reference(out, out_scale)


_Cache = tuple[torch.Tensor, torch.Tensor, float, float]


def _gather(
    cache: _Cache, tables: torch.Tensor, first: int, last: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[S, K, L, D]`` of tokens ``[first, last)``; ``first`` is a multiple of the block size."""
    k_cache, v_cache, k_scale, v_scale = cache
    _, kv_heads, block_size, head_dim = k_cache.shape
    ids = tables[:, first // block_size : -(-last // block_size)]
    flat = ids.reshape(-1)

    def read(data: torch.Tensor, scale: float) -> torch.Tensor:
        got = data.index_select(0, flat)
        if data.dtype == torch.float8_e4m3fn:
            got = (got.float() * scale).to(dtype)
        got = got.view(*ids.shape, kv_heads, block_size, head_dim).transpose(1, 2)
        return got.reshape(ids.shape[0], kv_heads, -1, head_dim)[:, :, : last - first]

    return read(k_cache, k_scale), read(v_cache, v_scale)


def _each_alone(
    q: torch.Tensor,
    cache: _Cache,
    tables: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    sm_scale: float,
    chunk_size: int | None,
) -> list[torch.Tensor]:
    """``[n, H, D]`` of every sequence, with the bits that its tokens have in any other step."""
    block_size = cache[0].shape[2]
    parts = []
    for s, length in enumerate(lengths):
        rows = q[starts[s] : starts[s + 1]]
        begin = length - rows.shape[0]
        first = begin // chunk_size * chunk_size // block_size * block_size if chunk_size else 0
        k, v = _gather(cache, tables[s : s + 1], first, length, q.dtype)
        parts.append(attend_each(rows, k, v, first, chunk_size, sm_scale))
    return parts


def _decode(
    q: torch.Tensor,
    cache: _Cache,
    tables: torch.Tensor,
    lengths: list[int],
    sm_scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """``[S, H, D]``: one query a sequence; the heads of a group are the query rows of one product."""
    num_seqs, num_heads, head_dim = q.shape
    kv_heads, block_size = cache[0].shape[1:3]
    begins = [max(n - 1, 0) // chunk_size * chunk_size if chunk_size else 0 for n in lengths]
    first, last = min(begins) // block_size * block_size, max(*lengths, 1)
    k, v = _gather(cache, tables, first, last, q.dtype)
    mask = None
    if any(b != first for b in begins) or any(n != last for n in lengths):
        j = torch.arange(first, last, device=q.device)
        bounds = torch.tensor([begins, lengths], device=q.device)[:, :, None]
        mask = ((j >= bounds[0]) & (j < bounds[1]))[:, None, None]
    rows = q.reshape(num_seqs, kv_heads, num_heads // kv_heads, head_dim)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=sm_scale)
    if mask is not None and not torch.isfinite(out).all():
        # A masked key or value still meets a zero, so what a failed sequence left in a block must be hidden.
        k, v = (x.masked_fill(~mask.transpose(2, 3), 0) for x in (k, v))
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=sm_scale)
    if min(lengths) == 0:
        out[[n == 0 for n in lengths]] = 0
    return out.reshape(num_seqs, num_heads, head_dim)


def _prefill(
    q: torch.Tensor,
    cache: _Cache,
    table: torch.Tensor,
    seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
) -> torch.Tensor:
    """``[n, H, D]``: the last n tokens of one sequence of ``seq_len`` tokens."""
    num_queries, num_heads, head_dim = q.shape
    kv_heads, block_size = cache[0].shape[1:3]
    start = seq_len - num_queries
    first = start // chunk_size * chunk_size // block_size * block_size if chunk_size else 0
    k, v = _gather(cache, table[None], first, seq_len, q.dtype)
    group = num_heads // kv_heads
    k, v = (x[0].unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    rows = q.reshape(num_queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    one_chunk = chunk_size is None or (first // chunk_size == (seq_len - 1) // chunk_size)
    plain = start == first and (chunk_size is None or (one_chunk and first % chunk_size == 0))
    mask = None
    if not plain:
        j = torch.arange(first, seq_len, device=q.device)
        i = j[start - first :, None]
        mask = j <= i
        if chunk_size is not None:
            mask &= j // chunk_size == i // chunk_size
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, is_causal=plain, scale=sm_scale)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sm_scale: float,
    chunk_size: int | None,
    k_scale: float,
    v_scale: float,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the decode kernels on the first ``num_decodes`` rows and the prefill kernel on the others."""
    num_tokens, num_heads, head_dim = q.shape
    dtype = q.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty((num_tokens, num_heads * head_dim), dtype=dtype, device=q.device)
    if is_invariant():
        seqs, lengths = _tokens_as_decodes(num_tokens, query_start, seq_lens)
        for i in range(0, num_tokens, TOKENS_AT_ONCE):
            tokens = slice(i, i + TOKENS_AT_ONCE)
            decode_attention(
                q[tokens], k_cache, v_cache, block_tables[seqs[tokens]], lengths[tokens], max_seq_len,
                sm_scale, chunk_size, k_scale, v_scale, out[tokens], DecodeTile(), NUM_SPLITS, out_scale,
            )  # fmt: skip
        return out
    if num_decodes:
        decode_attention(
            q[:num_decodes], k_cache, v_cache, block_tables, seq_lens, max_seq_len,
            sm_scale, chunk_size, k_scale, v_scale, out, out_scale=out_scale,
        )  # fmt: skip
    if num_tokens > num_decodes:
        prefill_attention(
            q, k_cache, v_cache, block_tables, query_start, seq_lens, num_decodes,
            sm_scale, chunk_size, k_scale, v_scale, out, out_scale=out_scale,
        )  # fmt: skip
    return out


def _tokens_as_decodes(
    num_tokens: int, query_start: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's sequence and how much of it the token sees, int32 ``[T]``; padding sees nothing."""
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=seq_lens.device)
    ends = query_start[1:]
    seqs = torch.searchsorted(ends, tokens, right=True, out_int32=True)
    is_padding = seqs == len(ends)
    seqs = seqs.clamp(max=len(ends) - 1)
    lengths = seq_lens[seqs] - (ends[seqs] - 1 - tokens)
    return seqs, lengths.masked_fill(is_padding, 0)
