"""The MoE layer for few tokens against the ops it replaces."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import moe_few
from outrider.kernels.gemv import GemvTile
from outrider.kernels.moe import route_reference
from outrider.kernels.moe_gemm import Tile
from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.quantize import Fp8Form, quantize_fp8_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.bfloat16 if GPU else torch.float32

LIMIT = 0.06
"""A last bit of the norm may round one value to the next e4m3 code, and one hidden value may rule a row."""


def make_layer(experts, expert_range, hidden, inter, shared_inter):
    """Random weights; every expert, output and operand has a scale of its own."""

    def codes(*shape):
        return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn)

    def scales(*shape):
        return torch.rand(shape, device=DEVICE) * 0.1 + 0.05

    local = expert_range[1]
    routed = moe_few.ExpertWeights(
        codes(local, 2 * inter, hidden), codes(local, hidden, inter), scales(local), scales(local),
        scales() / 4, scales() / 2, expert_range,
    )  # fmt: skip
    shared = moe_few.SharedWeights(
        codes(2 * shared_inter, hidden), scales(2 * shared_inter), scales() / 3,
        codes(hidden, shared_inter), scales(hidden), scales(),
    )  # fmt: skip
    return torch.randn(experts, hidden, device=DEVICE).to(WIDE), routed, shared


@pytest.mark.parametrize(
    "tiles",
    [
        None,
        (Tile(16, 64, 64, True, 2, 4), Tile(16, 64, 64, True, 2, 4, split_k=2)),
        (Tile(16, 32, 64, True, 2, 4), Tile(16, 128, 64, True, 2, 4, split_k=3)),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "experts", "expert_range", "shared_inter"),
    [(1, 5, (0, 5), 80), (16, 4, (0, 4), 80), (7, 20, (4, 9), 48), (3, 6, (5, 1), 160)],
)
def test_few_rows(tiles, tokens, experts, expert_range, shared_inter):
    """Guards: rows of another expert or rank, a scale of the wrong expert or half, partial sums lost or added twice."""
    router, routed, shared = make_layer(experts, expert_range, 96, 80, shared_inter)
    for _ in range(2):  # the second call meets the counters as the first left them
        x = torch.randn(tokens, 96, device=DEVICE).to(WIDE)
        residual, norm = torch.randn_like(x), moe_few.NormWeights(torch.randn_like(x[0]), 1e-2)
        summed = residual.clone()
        expected = moe_few.moe_few_reference(x, summed, norm, router, routed, shared).double()
        out = moe_few.moe_few_triton(x, residual, norm, router, routed, shared, tiles).double()
        assert torch.equal(residual, summed)
        assert float((out - expected).norm() / expected.norm()) < LIMIT


@pytest.mark.parametrize("up", [GemvTile(8, 1024, 2), GemvTile(32, 64, 4), None])
@pytest.mark.parametrize(("experts", "expert_range", "shared_inter"), [(4, (0, 4), 80), (20, (4, 9), 48)])
def test_one_token_without_tensor_cores(monkeypatch, up, experts, expert_range, shared_inter):
    """Guards: a gate taken for an up, rows beyond the last, an expert that another rank holds, exchanged inputs."""
    monkeypatch.setattr(moe_few, "UP_ONE_TILE", up)
    monkeypatch.setattr(moe_few, "DOWN_ONE_TILE", GemvTile(4, 64, 4))
    router, routed, shared = make_layer(experts, expert_range, 96, 80, shared_inter)
    norm = moe_few.NormWeights(torch.randn(96, device=DEVICE).to(WIDE), 1e-2)
    for _ in range(4):
        x, residual = torch.randn(2, 1, 96, device=DEVICE).to(WIDE).unbind()
        expected = moe_few.moe_few_reference(x, residual.clone(), norm, router, routed, shared).double()
        out = moe_few.moe_few_triton(x, residual, norm, router, routed, shared).double()
        assert float((out - expected).norm() / expected.norm()) < LIMIT


def test_a_row_of_several_tiles_is_routed_as_by_the_reference():
    """Guards: columns behind the first tile of the norm or the router left out, residual or row written short."""
    router, routed, shared = make_layer(40, (0, 40), 2304, 32, 32)
    norm = moe_few.NormWeights(torch.randn(2304, device=DEVICE).to(WIDE), 1e-5)
    x, residual = torch.randn(2, 5, 2304, device=DEVICE).to(WIDE).unbind()
    summed = residual.clone()
    y = rms_norm_reference(x, norm.weight, norm.eps, summed, Fp8Form(shared.input_scale))
    ids, scores = route_reference(torch.nn.functional.linear(y.y, router), 1)
    rows = moe_few.norm_route_triton(x, residual, norm, router, routed, shared)
    assert torch.equal(residual, summed)
    assert torch.equal(rows.expert_ids.long(), ids[:, 0].long())
    same = (rows.x[16:21].float() == y.fp8.codes.float()).float().mean()
    scaled = quantize_fp8_reference((y.y.float() * scores.float()).to(WIDE), routed.a13_scale)
    assert same > 0.99 and (rows.x[:5].float() == scaled.float()).float().mean() > 0.98
