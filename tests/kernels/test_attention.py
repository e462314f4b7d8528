"""Paged attention, decode and prefill, against float64 softmax over the visible tokens."""

from __future__ import annotations

from typing import NamedTuple

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels._dispatch import arrival_counters
from outrider.kernels.attention import paged_attention_reference, paged_attention_triton
from outrider.kernels.attention_decode import DecodeTile, decode_attention, pick_num_splits
from outrider.kernels.attention_prefill import PrefillTile, prefill_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [paged_attention_reference, paged_attention_triton]
FP8 = torch.float8_e4m3fn


class Case(NamedTuple):
    """The arguments of paged_attention, in order."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    sm_scale: float
    chunk_size: int | None
    k_scale: float
    v_scale: float


def make_case(query_lens, seq_lens, num_decodes, *, kv_heads, group, dim, block_size, chunk, dtype):
    """Random inputs; everything that no query may see (null block, ends of blocks) is NaN."""
    torch.manual_seed(torch.seed() % 2**31)
    width = -(-max(seq_lens) // block_size) + 1
    num_blocks = 1 + width * len(seq_lens)
    data = torch.randn(num_blocks, 3, 2, kv_heads, block_size, dim)
    data[0] = float("nan")
    tables = (1 + torch.randperm(num_blocks - 1)).view(len(seq_lens), width).int()
    for row, length in zip(tables, seq_lens, strict=True):
        used = -(-length // block_size)
        row[used:] = 0
        if length % block_size:
            data[int(row[used - 1]), ..., length % block_size :, :] = float("nan")
    data = data.to(DEVICE).to(dtype)
    query_dtype = torch.bfloat16 if dtype == FP8 else dtype
    q = torch.randn(sum(query_lens), kv_heads * group, dim).to(DEVICE).to(query_dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    scales = (0.7, 1.3) if dtype == FP8 else (1.0, 1.0)
    return Case(
        q, data[:, 1, 0], data[:, 1, 1], tables.to(DEVICE), starts, lens, num_decodes,
        max(query_lens), max(seq_lens), dim**-0.5, chunk, *scales,
    )  # fmt: skip


def exact_attention(case):
    """Float64, one sequence and one kv head at a time."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    _, kv_heads, block_size, _ = case.k_cache.shape
    group = case.q.shape[1] // kv_heads
    starts, q = case.query_start.tolist(), case.q.cpu().double()
    k_cache, v_cache = (c.cpu().double() for c in (case.k_cache, case.v_cache))
    for s, length in enumerate(case.seq_lens.tolist()):
        j = torch.arange(length)
        blocks = case.block_tables[s].cpu().long()[j // block_size]
        k = k_cache[blocks, :, j % block_size] * case.k_scale
        v = v_cache[blocks, :, j % block_size] * case.v_scale
        for row in range(starts[s], starts[s + 1] if length else starts[s]):
            i = length - (starts[s + 1] - row)
            first = i // case.chunk_size * case.chunk_size if case.chunk_size else 0
            for head in range(kv_heads):
                heads = slice(head * group, (head + 1) * group)
                scores = q[row, heads] @ k[first : i + 1, head].T * case.sm_scale
                out[row, heads] = scores.softmax(-1) @ v[first : i + 1, head]
    return out.flatten(1)


def error(out, exact):
    return float((out.cpu().double() - exact).norm() / exact.norm())


def bound(case, exact):
    """Twice the error of the plain-torch path in the same dtypes."""
    return (
        2
        * error(
            paged_attention_reference(*[x.cpu() if isinstance(x, torch.Tensor) else x for x in case]), exact
        )
        + 1e-6
    )


SHAPES = [
    # kv_heads, group, dim, block_size, chunk, dtype
    (3, 3, 64, 16, None, torch.float32),
    (2, 1, 64, 32, 48, torch.bfloat16),
    (1, 5, 128, 64, None, FP8),
    (2, 5, 128, 64, 96, FP8),
    (1, 5, 64, 16, 7, torch.float32),
    (1, 3, 64, 32, 64, FP8),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", PATHS)
def test_mixed_batch(op, shape):
    """Guards: ragged decodes and prefills, graph padding, chunk borders, NaN left in blocks by others."""
    kv_heads, group, dim, block_size, chunk, dtype = shape
    case = make_case(
        [1, 1, 1, 1, 33, 60, 2, 26], [130, 0, 1, 96, 33, 150, 5, 97], 4,
        kv_heads=kv_heads, group=group, dim=dim, block_size=block_size, chunk=chunk, dtype=dtype,
    )  # fmt: skip
    exact = exact_attention(case)
    out = op(*case)
    assert torch.all(out[1] == 0)
    assert error(out, exact) <= bound(case, exact)


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_decodes"),
    [([1], [1], 1), ([1], [65], 1), ([40], [40], 0), ([1], [70], 0), ([64, 1], [64, 129], 0)],
)
def test_lone_sequences(op, query_lens, seq_lens, num_decodes):
    """Guards: batches of one, first tokens, a single query that comes as a prefill, exact block borders."""
    case = make_case(
        query_lens, seq_lens, num_decodes,
        kv_heads=2, group=3, dim=64, block_size=32, chunk=None, dtype=torch.float32,
    )  # fmt: skip
    exact = exact_attention(case)
    assert error(op(*case), exact) < 1e-6


@pytest.mark.parametrize("merge", [0, 2])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_result_as_fp8(num_splits, merge):
    """Guards: the scale forgotten or inverted in one of the four epilogues, values that overflow to NaN."""
    case = make_case(
        [1, 1, 1, 33, 2], [130, 0, 96, 33, 50], 3,
        kv_heads=2, group=3, dim=64, block_size=32, chunk=None, dtype=FP8,
    )  # fmt: skip
    scale = torch.tensor(0.002, device=DEVICE)  # some values are beyond 448 * scale
    expected = (paged_attention_reference(*case).float() / scale).clamp(-448, 448)
    out = torch.full((38, 6 * 64), float("nan"), device=DEVICE).to(FP8)
    decode_attention(
        case.q[:3], case.k_cache, case.v_cache, case.block_tables, case.seq_lens[:3], 130, case.sm_scale, None,
        case.k_scale, case.v_scale, out, DecodeTile(merge_at_once=merge), num_splits, out_scale=scale,
    )  # fmt: skip
    assert error(out[:3].float(), expected[:3].cpu().double()) < 0.04
    out = paged_attention_triton(*case, out_scale=scale)
    assert out.dtype == FP8 and error(out.float(), expected.cpu().double()) < 0.04
    assert torch.equal(paged_attention_reference(*case, out_scale=scale).float(), expected.to(FP8).float())


@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (70, 2)])
def test_padding_behind_the_prefills_becomes_zeros(padding):
    """Guards: rows of no sequence left as memory was, whether the last sequence is real or padding."""
    rows, seqs = padding
    case = make_case(
        [1, 20, 9],
        [40, 20, 50],
        1,
        kv_heads=2,
        group=3,
        dim=64,
        block_size=32,
        chunk=None,
        dtype=torch.float32,
    )
    exact = exact_attention(case)
    padded = case._replace(
        q=torch.cat((case.q, torch.full((rows, 6, 64), float("nan"), device=DEVICE))),
        query_start=torch.cat((case.query_start, case.query_start[-1:].expand(seqs))),
        seq_lens=torch.cat((case.seq_lens, case.seq_lens.new_zeros(seqs))),
        block_tables=torch.cat(
            (case.block_tables, case.block_tables.new_zeros(seqs, case.block_tables.shape[1]))
        ),
    )
    out = torch.full((30 + rows, 6 * 64), float("nan"), device=DEVICE)
    prefill_attention(*padded[:6], 1, *padded[9:], out)
    assert error(out[1:30], exact[1:]) < 1e-6 and torch.all(out[30:] == 0)


@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize(("tokens", "merge"), [(32, 0), (64, 0), (128, 0), (32, 2), (32, 4), (64, 16)])
def test_decode_splits(tokens, merge, num_splits, chunk):
    """Guards both merges: splits without tokens, more splits than tiles, tiles wider than a block."""
    case = make_case(
        [1] * 5, [300, 1, 64, 129, 0], 5,
        kv_heads=1, group=5, dim=64, block_size=32, chunk=chunk, dtype=torch.float32,
    )  # fmt: skip
    out = torch.full((5, 5 * 64), float("nan"), device=DEVICE)
    decode_attention(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, 300, case.sm_scale, chunk,
        1.0, 1.0, out, DecodeTile(tokens, merge_at_once=merge), num_splits,
    )  # fmt: skip
    assert error(out, exact_attention(case)) < 1e-6
    assert not arrival_counters(out.device).any()


@pytest.mark.parametrize(
    "tile", [PrefillTile(16, 16, 4, 1), PrefillTile(64, 32, 4, 2), PrefillTile(64, 128, 4, 1)]
)
@pytest.mark.parametrize("chunk", [None, 24, 64])
def test_prefill_tiles(tile, chunk):
    """Guards the tile map: tiles of several sequences, chunks that end inside a tile or a block."""
    case = make_case(
        [1, 20, 3, 70, 4], [90, 20, 3, 133, 64], 0,
        kv_heads=2, group=3, dim=64, block_size=32, chunk=chunk, dtype=torch.float32,
    )  # fmt: skip
    out = torch.full((98, 6 * 64), float("nan"), device=DEVICE)
    prefill_attention(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.query_start, case.seq_lens, 0,
        case.sm_scale, chunk, 1.0, 1.0, out, tile,
    )  # fmt: skip
    assert error(out, exact_attention(case)) < 1e-6


def test_number_of_splits():
    """Guards: an idle device at batch 1, a merge that nobody needs at batch 512, no split at all."""
    tile = DecodeTile()
    assert pick_num_splits(1, 8, 1, 132, tile) == 1
    assert pick_num_splits(1, 8, 1024, 132, tile) * 8 >= 100
    assert pick_num_splits(512, 8, 9216, 132, tile) == 1
    assert pick_num_splits(1, 8, 1 << 20, 132, tile) <= 64
