"""The kernels under ``--deterministic``: a token has the same bits alone, in company, cut anywhere and padded."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch
from test_attention import error as attention_error
from test_attention import exact_attention, make_case

from outrider.kernels import gemm, invariant, moe, sampling
from outrider.kernels.attention import paged_attention_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.bfloat16 if GPU else torch.float32


@pytest.fixture(autouse=True)
def is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``make_invariant`` leaves it, without the mode that would stay for other tests."""
    monkeypatch.setattr(invariant, "_is_on", True)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("others", [0, 1, 15, 64, 200])
def test_products_of_a_row(fp8: bool, others: int) -> None:
    """Guards against a tile or a split that follows the number of rows."""
    tile = gemm.INVARIANT_TILES[torch.float8_e4m3fn if fp8 else torch.bfloat16]
    depth, outputs = 304, 130
    dtype = torch.float8_e4m3fn if fp8 else WIDE
    x = torch.randn(1 + others, depth, device=DEVICE).to(dtype)
    weight = torch.randn(outputs, depth, device=DEVICE).to(dtype)
    scale = torch.rand(outputs, device=DEVICE) if fp8 else None
    for place in {0, others // 2, others}:
        alone = gemm.skinny_triton(x[place : place + 1], weight, None, scale, WIDE, tile)
        company = gemm.skinny_triton(x, weight, None, scale, WIDE, tile)
        assert torch.equal(alone[0], company[place])


@pytest.mark.skipif(not GPU, reason="the tables of tiles are asked for CUDA tensors only")
@pytest.mark.parametrize("rows", [1, 16, 65, 4000])
def test_products_take_the_one_tile(rows: int) -> None:
    """Guards against a size that goes to another library."""
    x = torch.randn(rows, 512, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(384, 512, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(gemm.linear(x, weight)[:1], gemm.linear(x[:1], weight))


def test_experts_take_one_tile_that_splits_nothing() -> None:
    """Guards against sums of an expert that follow how many rows it was given."""
    for table in (moe.FP8_TILES, moe.BF16_TILES):
        chosen = {moe.choose_tiles(table, rows, 16) for rows in (1, 16, 300, 5000, 10**6)}
        assert len(chosen) == 1 and all(tile.split_k == 1 for tile in chosen.pop())


@pytest.mark.parametrize("chunk", [None, 32])
def test_attention_of_a_token(chunk: int | None) -> None:
    """Guards against bits that depend on chunk borders, other sequences, padding, or being a decode."""
    lens, queries = [50, 9, 70], [50, 9, 70]
    fields = {"kv_heads": 2, "group": 3, "dim": 16, "block_size": 16, "chunk": chunk, "dtype": WIDE}
    case = make_case(queries, lens, 0, **fields)
    whole = paged_attention_triton(*case)
    assert attention_error(whole, exact_attention(case)) < (1e-2 if GPU else 1e-5)
    starts = case.query_start.tolist()
    for s, cut in ((0, 31), (2, 69), (1, 3)):
        first, last = starts[s] + cut, starts[s + 1]
        tail = case._replace(
            q=case.q[first:last],
            block_tables=case.block_tables[s : s + 1],
            query_start=torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE),
            seq_lens=case.seq_lens[s : s + 1],
            num_decodes=int(last - first == 1),
        )
        assert torch.equal(paged_attention_triton(*tail), whole[first:last])
    padded = case._replace(
        q=torch.cat([case.q, case.q[:5]]),
        block_tables=torch.cat([case.block_tables, case.block_tables[:1] * 0]),
        query_start=torch.cat([case.query_start, case.query_start[-1:]]),
        seq_lens=torch.cat([case.seq_lens, case.seq_lens[:1] * 0]),
    )
    out = paged_attention_triton(*padded)
    assert torch.equal(out[: len(whole)], whole) and not out[len(whole) :].any()


@pytest.mark.parametrize("count", [1, 5, 16, 40])
def test_log_probabilities_of_a_row(count: int) -> None:
    """Guards against sums over the vocabulary, and an order of equals, that follow the other rows' wishes."""
    logits = torch.randn(count, 1000, device=DEVICE).mul(4).round().to(WIDE)  # many equals
    ids = torch.randint(1000, (count,), device=DEVICE)
    whole = sampling.top_logprobs(logits, ids, 20)
    for i in range(0, count, 7):
        alone = sampling.top_logprobs(logits[i : i + 1], ids[i : i + 1], 3)
        for one, many in zip(alone, whole, strict=True):
            assert torch.equal(one[0], many[i][:3] if many.dim() == 2 else many[i])
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(
        whole.logprob.double(), exact.gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=1e-4
    )


def test_blocks_of_nothing_and_of_several_inputs() -> None:
    """Guards against shapes that are lost when no row is there, and against padding that comes back."""
    double = invariant.by_blocks(lambda x, y: (x + 1, y.sum(1)), torch.zeros(0, 3), torch.zeros(0, 4))
    assert [tuple(x.shape) for x in double] == [(0, 3), (0,)]
    first, second = invariant.by_blocks(lambda x, y: (x + 1, y.sum(1)), torch.zeros(37, 3), torch.ones(37, 4))
    assert first.shape == (37, 3) and second.tolist() == [4.0] * 37
