"""Products of one row against float64 and against the reference of the ops that they replace."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.gemv import GemvTile, down_one_triton, gemv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def e4m3(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tile", [GemvTile(4, 128, 4), GemvTile(8, 64, 2), GemvTile(1, 256, 4)])
@pytest.mark.parametrize("with_x_scale", [False, True])
@pytest.mark.parametrize(("outputs", "depth"), [(70, 272), (64, 256), (3, 16)])
def test_one_row(tile, with_x_scale, outputs, depth):
    """Guards: rows or columns beyond the end, a scale of another output, columns of a load added to a neighbour's."""
    x, weight = e4m3(1, depth), e4m3(outputs, depth)
    w_scale = torch.rand(outputs, device=DEVICE) + 0.1
    x_scale = torch.rand((), device=DEVICE) + 0.1 if with_x_scale else None
    exact = x.double() @ weight.double().T * w_scale.double()
    exact = exact if x_scale is None else exact * x_scale.double()
    assert tile.takes(depth)
    out = gemv_triton(x, weight, x_scale, w_scale, torch.float32, tile)
    assert out.shape == exact.shape and error(out, exact) < 1e-6


@pytest.mark.parametrize("expert", [0, 2, -1])
@pytest.mark.parametrize(("inter", "shared_inter"), [(80, 144), (256, 128)])
def test_down_of_one_token(expert, inter, shared_inter):
    """Guards: another expert's weights or scale, the two inputs exchanged, a part of an expert held elsewhere."""
    hidden, shared_hidden = e4m3(inter), e4m3(shared_inter)
    w2, shared = e4m3(3, 50, inter), e4m3(50, shared_inter)
    w_scale, x_scale = torch.rand(3, device=DEVICE) + 0.1, torch.rand((), device=DEVICE) + 0.1
    shared_w_scale, shared_x_scale = torch.rand(50, device=DEVICE) + 0.1, torch.rand((), device=DEVICE) + 0.1
    exact = shared.double() @ shared_hidden.double() * shared_w_scale.double() * shared_x_scale.double()
    if expert >= 0:
        exact += w2[expert].double() @ hidden.double() * w_scale[expert].double() * x_scale.double()
    expert_id = torch.tensor([expert], dtype=torch.int32, device=DEVICE)
    out = down_one_triton(
        hidden, shared_hidden, expert_id, w2, x_scale, w_scale, shared, shared_x_scale, shared_w_scale,
        torch.float32, GemvTile(4, 64, 4),
    )  # fmt: skip
    assert out.shape == (1, 50) and error(out[0], exact) < 1e-6


def test_rows_that_do_not_fit_the_registers():
    """Guards: a launch that spills its weights to memory, and rows that start off a 16-byte border."""
    assert GemvTile(8, 512, 4).takes(5120)
    assert not GemvTile(16, 512, 4).takes(5120)
    assert not GemvTile(1, 512, 4).takes(5112)
