"""RMS norm, alone and fused, against float64 arithmetic."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.norm import (
    LazySum,
    rms_norm_fp8_triton,
    rms_norm_reference,
    rms_norm_triton,
)
from outrider.kernels.quantize import (
    Fp8Form,
    ScaledRows,
    quantize_fp8_rowwise_reference,
    quantize_fp8_rowwise_triton,
)

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
    assert out.fp8 is None and out.operand is out.y
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
    y, (codes, code_scale) = op(x, weight, 1e-5, None, Fp8Form(scale))
    assert code_scale is scale
    exact = (y.double() / 0.01).clamp(-448, 448)
    assert float(exact.abs().max()) == 448
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.allclose(codes.double(), exact, rtol=2**-4 * 1.2, atol=2**-9)


@pytest.mark.parametrize(
    ("op", "quantize"),
    [
        (rms_norm_reference, quantize_fp8_rowwise_reference),
        (rms_norm_triton, quantize_fp8_rowwise_triton),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 576), (5, 130), (3, 1100)])
def test_a_scale_a_row_is_that_of_the_rounded_norm(op, quantize, dtype, rows, cols):
    """Guards: the scale of the row before its weight or its rounding; bits other than of norm, then quantisation."""
    x, residual = (torch.randn(rows, cols, dtype=dtype, device=DEVICE) for _ in range(2))
    x[0] = residual[0] = 0
    weight = torch.randn(cols, dtype=dtype, device=DEVICE)
    plain, again = residual.clone(), residual.clone()
    y = op(x, weight, 1e-5, plain).y
    out = op(x, weight, 1e-5, again, Fp8Form())
    expected = quantize(out.y)
    assert torch.equal(again, plain) and out.operand is out.fp8
    # Tiles add the squares up in another order.
    assert torch.allclose(out.y, y, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    assert torch.equal(out.fp8.codes.float(), expected.codes.float())
    assert torch.equal(out.fp8.scale, expected.scale)


@pytest.mark.parametrize("form", [Fp8Form(), Fp8Form(torch.tensor(0.03, device=DEVICE))])
def test_the_next_products_operand_alone(form):
    """Guards: codes that depend on whether the norm is written in the model dtype too; a residual left as it was."""
    x, residual = torch.randn(2, 3, 257, device=DEVICE).unbind()
    weight = torch.randn(257, device=DEVICE)
    both, alone = residual.clone(), residual.clone()
    expected = rms_norm_triton(x, weight, 1e-5, both, form).fp8
    out = rms_norm_fp8_triton(x, weight, 1e-5, alone, form)
    assert torch.equal(alone, both)
    assert torch.equal(out.codes.float(), expected.codes.float()) and torch.equal(out.scale, expected.scale)


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("form", [None, Fp8Form(), Fp8Form(torch.tensor(0.03, device=DEVICE))])
def test_a_sum_is_rounded_before_it_meets_the_residual(op, form):
    """Guards: three terms added in one go, a second term left out, rows of the second at the first one's stride."""
    a, residual = torch.randn(2, 5, 1100, dtype=torch.bfloat16, device=DEVICE).unbind()
    b = torch.randn(5, 1200, dtype=torch.bfloat16, device=DEVICE)[:, :1100]
    weight = torch.randn(1100, dtype=torch.bfloat16, device=DEVICE)
    again = residual.clone()
    expected = op(a + b, weight, 1e-5, residual, form)
    out = op(LazySum(a.clone(), b), weight, 1e-5, again, form)
    assert torch.equal(again, residual) and torch.equal(out.y, expected.y)
    if form is not None:
        assert torch.equal(out.fp8.codes.float(), expected.fp8.codes.float())


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_sum", [False, True])
def test_rows_without_their_scales_are_those_with_them(op, dtype, is_sum):
    """Guards: another row's scale, one for both terms of a sum, or one that meets the sum after its rounding."""
    y, second, residual = torch.randn(3, 5, 1100, dtype=dtype, device=DEVICE).unbind()
    scale = torch.exp2(torch.randint(-9, 5, (5,), device=DEVICE).float())
    applied = (y.double() * scale.double()[:, None]).to(dtype)
    weight = torch.randn(1100, dtype=dtype, device=DEVICE)
    again, rows = residual.clone(), ScaledRows(y, scale)
    assert torch.equal(rows.tensor(), applied)
    expected = op(LazySum(applied, second) if is_sum else applied, weight, 1e-5, residual, Fp8Form())
    out = op(LazySum(rows, second) if is_sum else rows, weight, 1e-5, again, Fp8Form())
    assert torch.equal(again, residual) and torch.equal(out.y, expected.y)
    assert torch.equal(out.fp8.codes.float(), expected.fp8.codes.float())
    assert torch.equal(out.fp8.scale, expected.fp8.scale)


@pytest.mark.parametrize("op", PATHS)
def test_row_slices_and_no_rows(op):
    """Guards: assuming that rows of x are adjacent in memory; launching an empty grid."""
    wide = torch.randn(4, 96, device=DEVICE)
    weight = torch.randn(40, device=DEVICE)
    assert torch.allclose(op(wide[:, :40], weight, 1e-5).y, op(wide[:, :40].contiguous(), weight, 1e-5).y)
    assert op(wide[:0, :40], weight, 1e-5).y.shape == (0, 40)
