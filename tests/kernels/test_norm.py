"""RMS norm, alone and fused, against float64 arithmetic."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.norm import rms_norm_reference, rms_norm_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [rms_norm_reference, rms_norm_triton]


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 576), (3, 7), (5, 130), (2, 5120)])
def test_norm_of_the_residual_sum(op, dtype, rows, cols):
    """Guards: the norm of x instead of x + residual; a residual that is not updated; a wrong mean on odd widths."""
    x, residual = (torch.randn(rows, cols, dtype=dtype, device=DEVICE) for _ in range(2))
    weight = torch.randn(cols, dtype=dtype, device=DEVICE)
    total = residual + x
    wide = total.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-2) * weight.double()
    out = op(x, weight, 1e-2, residual)
    assert torch.equal(residual, total)
    assert out.y_fp8 is None
    assert error(out.y, exact) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("op", PATHS)
def test_rounds_before_the_weight(op):
    """Guards the order of roundings: cast to the model dtype first, multiply by the weight after."""
    x = torch.randn(4, 640, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(640, dtype=torch.bfloat16, device=DEVICE)
    wide = x.double()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)
    same = (op(x, weight, 1e-5).y == normed * weight).float().mean()
    assert same > 0.995  # float32 and float64 may round a few values to different neighbours


@pytest.mark.parametrize("op", PATHS)
def test_fp8_output_is_scaled_and_clamped(op):
    """Guards: multiplying by the scale instead of dividing, and overflow to NaN instead of 448."""
    x = torch.randn(3, 257, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((257,), 2.0, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.tensor(0.01, device=DEVICE)
    y, y_fp8 = op(x, weight, 1e-5, None, scale)
    exact = (y.double() / 0.01).clamp(-448, 448)
    assert float(exact.abs().max()) == 448
    assert y_fp8.dtype == torch.float8_e4m3fn
    assert torch.allclose(y_fp8.double(), exact, rtol=2**-4 * 1.2, atol=2**-9)


@pytest.mark.parametrize("op", PATHS)
def test_row_slices_and_no_rows(op):
    """Guards: assuming that rows of x are adjacent in memory; launching an empty grid."""
    wide = torch.randn(4, 96, device=DEVICE)
    weight = torch.randn(40, device=DEVICE)
    assert torch.allclose(op(wide[:, :40], weight, 1e-5).y, op(wide[:, :40].contiguous(), weight, 1e-5).y)
    assert op(wide[:0, :40], weight, 1e-5).y.shape == (0, 40)
