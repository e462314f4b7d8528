"""Routing and expert MLPs against per-token float64 arithmetic."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import moe, moe_dispatch
from outrider.kernels.moe_dispatch import (
    PLAIN,
    STATIC_FP8,
    STREAM_FP8,
    gather_rows_triton,
)
from outrider.kernels.moe_gemm import Tile
from outrider.kernels.nvfp4 import dequantize_nvfp4
from outrider.kernels.quantize import quantize_fp8_reference, quantize_fp8_rowwise_reference
from outrider.kernels.router import route_rows_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.bfloat16 if GPU else torch.float32  # the interpreter cannot multiply bfloat16 blocks
SWAPPED = (Tile(16, 64, 64, True, 2, 4), Tile(16, 64, 64, True, 2, 4, split_k=2))
PERSISTENT = (
    Tile(16, 64, 64, True, 2, 4, programs_per_sm=1),
    Tile(16, 64, 64, True, 2, 4, programs_per_sm=1),
)
ROWS_FIRST = (Tile(64, 32, 64, False, 2, 4), Tile(64, 64, 64, False, 2, 4, programs_per_sm=1))
TILES = [SWAPPED, PERSISTENT, ROWS_FIRST]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def slow_moe(x, expert_ids, scores, w13, w2, first=0):
    """Token by token, choice by choice, in float64: scale the input, gate, up, down, add."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (ids, weights) in enumerate(zip(expert_ids.tolist(), scores.double(), strict=True)):
        for expert, score in zip(ids, weights, strict=True):
            if 0 <= expert - first < w13.shape[0]:
                gate, up = (w13[expert - first].double() @ (x[token].double() * score)).chunk(2)
                out[token] += w2[expert - first].double() @ (gate * torch.sigmoid(gate) * up)
    return out


def route_triton(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's kernel on rows that are the logits themselves."""
    return route_rows_triton(logits, torch.eye(logits.shape[1], device=DEVICE), top_k)


@pytest.mark.parametrize("op", [moe.route_reference, route_triton])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 1), (37, 5, 2), (20, 128, 1)])
def test_route(op, tokens, experts, top_k):
    """Guards: softmax or renormalised scores in place of the sigmoid, ties that do not take the lowest expert."""
    logits = randn(tokens, experts)
    logits[0] = 1.5  # all equal
    ids, scores = op(logits, top_k)
    values, expected = logits.topk(top_k, dim=-1)
    assert ids.dtype == torch.int32 and torch.equal(ids[1:].long(), expected[1:])
    assert ids[0].tolist() == list(range(top_k))
    assert torch.allclose(scores, torch.sigmoid(values))


@pytest.mark.parametrize("mode", [PLAIN, STATIC_FP8, STREAM_FP8])
@pytest.mark.parametrize(
    ("tokens", "top_k", "lone_rows", "scanned"), [(1, 1, 64, 64), (41, 1, 64, 16), (23, 2, 22, 32)]
)
def test_gather_sorts_rows_by_expert(monkeypatch, mode, tokens, top_k, lone_rows, scanned):
    """Guards: an unstable or wrong sort, also where ids are counted in parts and a program takes several rows; foreign
    experts' rows; the score missing or applied after quantising; the wrong order for repacked weights."""
    monkeypatch.setattr(moe_dispatch, "LONE_ROWS", lone_rows)
    monkeypatch.setattr(moe_dispatch, "MOST_SCANNED", scanned)
    x = randn(tokens, 1536 if mode == STREAM_FP8 else 72)
    ids, scores = moe.route_reference(randn(tokens, 6), top_k)
    scale = torch.tensor(0.01, device=DEVICE)
    rows = gather_rows_triton(x, ids, scores, (1, 4), mode, scale)
    local = [i for expert in range(1, 5) for i, e in enumerate(ids.flatten().tolist()) if e == expert]
    counts = [ids.flatten().tolist().count(expert) for expert in range(1, 5)]
    assert rows.offsets.tolist() == [sum(counts[:i]) for i in range(5)]
    assert rows.index[: len(local)].tolist() == local
    expected = (
        x[torch.tensor(local, dtype=torch.long, device=DEVICE) // top_k] * scores.flatten()[local, None]
    )
    got = rows.x[: len(local)].float()
    if mode == PLAIN:
        assert torch.equal(got, expected)
    elif mode == STATIC_FP8:
        assert torch.equal(got, quantize_fp8_reference(expected, scale).float())
    else:
        codes, row_scale = quantize_fp8_rowwise_reference(expected)
        codes = codes.float().unflatten(1, (-1, 8, 4, 4, 4)).permute(0, 1, 3, 4, 2, 5).flatten(1)
        assert torch.equal(rows.scale[: len(local)], row_scale)
        # A GPU may divide another way: a code on the edge becomes its neighbour, an eighth away.
        assert torch.equal(got, codes) if not GPU else torch.allclose(got, codes, rtol=0.13, atol=2.0**-9)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("tokens", "top_k", "expert_range"), [(1, 1, None), (21, 1, None), (9, 2, (1, 3))])
def test_unquantised_experts(tiles, tokens, top_k, expert_range):
    """Guards: score on the output, gate and up exchanged, rows returned to the wrong token, ragged tiles."""
    num_local = expert_range[1] if expert_range else 5
    w13, w2 = randn(num_local, 2 * 72, 104).to(WIDE) / 10, randn(num_local, 104, 72).to(WIDE) / 8
    x = randn(tokens, 104).to(WIDE)
    ids, scores = moe.route_reference(randn(tokens, 5), top_k)
    exact = slow_moe(x, ids, scores, w13, w2, expert_range[0] if expert_range else 0)
    if not exact.any():
        ids[0, 0] = expert_range[0]
        exact = slow_moe(x, ids, scores, w13, w2, expert_range[0])
    arguments = (x, ids, scores, w13, w2, expert_range)
    assert error(moe.moe_bf16_reference(*arguments), exact) < (1e-2 if GPU else 1e-5)
    assert error(moe.moe_bf16_triton(*arguments, tiles), exact) < (1e-2 if GPU else 1e-5)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (33, 1), (6, 2)])
def test_fp8_experts(tiles, tokens, top_k):
    """Guards: one expert's scale on another, quantising before the score, scales missing from the epilogue."""
    w13, w2 = randn(4, 2 * 80, 96).to(torch.float8_e4m3fn), randn(4, 96, 80).to(torch.float8_e4m3fn)
    w13_scale, w2_scale = torch.rand(4, device=DEVICE) * 0.1 + 0.05, torch.rand(4, device=DEVICE) * 0.1 + 0.05
    x = randn(tokens, 96).to(WIDE)
    ids, scores = moe.route_reference(randn(tokens, 4), top_k)
    a13, a2 = torch.tensor(0.02, device=DEVICE), torch.tensor(0.05, device=DEVICE)
    arguments = (x, ids, scores, w13, w2, w13_scale, w2_scale, a13, a2)
    exact = slow_moe(
        x, ids, scores, w13.double() * w13_scale[:, None, None], w2.double() * w2_scale[:, None, None]
    )
    reference = moe.moe_fp8_reference(*arguments)
    assert error(reference, exact) < 0.15  # two e4m3 roundings: 0.05 usually, 0.1 for one unlucky token
    assert error(moe.moe_fp8_triton(*arguments, None, tiles), reference.double()) < 0.02


@pytest.mark.parametrize("tiles", TILES)
def test_nvfp4_experts(tiles):
    """Guards: gate and up rows of packed weights, an expert's scales, and the global scale of each projection."""
    experts, hidden, inter, tokens = 3, 288, 272, 11

    def weights(*shape: int, global_scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=DEVICE)
        scale = (torch.rand(*shape[:-1], shape[-1] // 16, device=DEVICE) * 300 + 9).to(torch.float8_e4m3fn)
        return packed, scale, torch.tensor(global_scale, device=DEVICE)

    up = weights(experts, 2 * inter, hidden, global_scale=1e-4)
    down = weights(experts, hidden, inter, global_scale=2e-4)
    x = randn(tokens, hidden).to(WIDE)
    ids, scores = moe.route_reference(randn(tokens, experts), 1)
    exact = slow_moe(
        x, ids, scores, dequantize_nvfp4(*up, torch.float64), dequantize_nvfp4(*down, torch.float64)
    )
    arguments = (x, ids, scores, *up, *down)
    assert error(moe.moe_nvfp4_reference(*arguments), exact) < (1e-2 if GPU else 1e-5)
    assert error(moe.moe_nvfp4_triton(*arguments, None, tiles), exact) < (1e-2 if GPU else 1e-5)
