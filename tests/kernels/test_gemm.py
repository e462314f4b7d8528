"""Dense products against float64, in the reference and in the Triton kernel."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import gemm
from outrider.kernels.gemm import SkinnyTile

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.bfloat16 if GPU else torch.float32  # the interpreter cannot multiply bfloat16 blocks


def e4m3(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def skinny(split: int, x, weight, x_scale, w_scale, dtype):
    """The Triton kernel with about ``split`` parts of the depth."""
    tiles = -(-weight.shape[0] // 64)
    per_sm = max(1, -(-split * tiles // gemm.num_sms(x.device)))
    return gemm.skinny_triton(x, weight, x_scale, w_scale, dtype, SkinnyTile(64, 64, 3, 4, per_sm))


def one_part(*args):
    return skinny(1, *args)


def many_parts(*args):
    return skinny(8, *args)


@pytest.mark.parametrize("op", [gemm.fp8_linear_reference, one_part, many_parts])
@pytest.mark.parametrize("per_row", [False, True, None])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 70, 272), (7, 64, 64), (33, 130, 304)])
def test_fp8_product(op, per_row, rows, outputs, depth):
    """Guards: scales on the wrong side, ragged tiles, a split that drops or doubles part of the depth."""
    x, weight = e4m3(rows, depth), e4m3(outputs, depth)
    x_scale = torch.rand(rows if per_row else (), device=DEVICE) + 0.1
    w_scale = torch.rand(outputs, device=DEVICE) + 0.1
    if per_row is None:  # the scale of x is part of the weight's
        x_scale = None
    exact = x.double() @ weight.double().T * w_scale.double()
    if x_scale is not None:
        exact *= x_scale.double().reshape(-1, 1)
    out = op(x, weight, x_scale, w_scale, torch.float32)
    assert out.shape == (rows, outputs)
    assert error(out, exact) < (2e-3 if GPU else 1e-5)


@pytest.mark.parametrize("split", [1, 5])
def test_plain_product(split):
    """Guards: scaling where there is no scale."""
    x, weight = (
        torch.randn(9, 200, device=DEVICE, dtype=WIDE),
        torch.randn(90, 200, device=DEVICE, dtype=WIDE),
    )
    out = skinny(split, x, weight, None, None, torch.float32)
    assert error(out, x.double() @ weight.double().T) < 1e-5


def test_split_parts_leave_their_counters_at_zero():
    """Guards: a second launch that finds the counters of the first and never finishes a tile."""
    x, weight, scale = e4m3(3, 512), e4m3(64, 512), torch.ones(64, device=DEVICE)
    runs = [skinny(4, x, weight, scale[0], scale, torch.float32) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not gemm.arrival_counters(x.device).any()


@pytest.mark.skipif(not GPU, reason="cuBLASLt needs a GPU")
@pytest.mark.parametrize("per_row", [False, True, None])
def test_cublas_product(per_row):
    """Guards: cuBLASLt's layout and scale conventions."""
    x, weight = e4m3(130, 256), e4m3(384, 256)
    x_scale = torch.rand(130 if per_row else (), device=DEVICE) + 0.1
    w_scale = torch.rand(384, device=DEVICE) + 0.1
    exact = x.double() @ weight.double().T * x_scale.double().reshape(-1, 1) * w_scale.double()
    if per_row is None:
        exact, x_scale = exact / x_scale.double(), None
    assert error(gemm.fp8_linear_cublas(x, weight, x_scale, w_scale, torch.bfloat16), exact) < 5e-3


@pytest.mark.skipif(not GPU, reason="cuBLASLt needs a GPU")
@pytest.mark.parametrize("outputs", [384, 8320])
def test_cublas_product_with_one_scale(outputs):
    """Guards: the scale forgotten or taken twice, on both sides of the number of rows up to which it is asked for."""
    scales = torch.full((outputs,), 0.37, device=DEVICE)
    for rows in (70, 1024, 1600):
        x, weight = e4m3(rows, 256), e4m3(outputs, 256)
        exact = x.double() @ weight.double().T * scales.double()
        out = gemm.fp8_linear_cublas(x, weight, None, scales, torch.bfloat16, scales[:1])
        assert error(out, exact) < 5e-3


def test_who_is_asked_with_one_scale(monkeypatch):
    """Guards: rows of the skinny tiles, rows beyond what was measured, a CPU; sums that follow the number of rows."""
    weights = [torch.empty(n, 256, dtype=torch.float8_e4m3fn, device="meta") for n in (8192, 8208)]
    assert not any(gemm.one_scale_is_faster(512, weight) for weight in weights)
    monkeypatch.setattr(gemm, "on_gpu", lambda _: True)
    most = gemm.SKINNY_TILES[torch.float8_e4m3fn][-1][0]
    for weight, (_, last) in zip(weights, gemm.ONE_SCALE_ROWS, strict=True):
        asked = [gemm.one_scale_is_faster(rows, weight) for rows in (1, most, most + 1, last, last + 1)]
        assert asked == [False, False, True, True, False]
    monkeypatch.setattr(gemm, "is_invariant", lambda: True)
    assert not any(gemm.one_scale_is_faster(512, weight) for weight in weights)


@pytest.mark.parametrize(
    ("tiles", "steps", "wanted"), [(1, 1, 264), (80, 20, 264), (3158, 40, 264), (2, 7, 264)]
)
def test_every_part_of_a_split_has_work(tiles, steps, wanted):
    """Guards: parts beyond the end of the depth, which would wait in vain or count twice."""
    split = gemm._split_k(tiles, steps, wanted)
    per_part = -(-steps // split)
    assert 1 <= split <= steps and (split - 1) * per_part < steps
