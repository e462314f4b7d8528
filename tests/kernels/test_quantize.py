"""FP8 quantisation of activations against exact float64 arithmetic on the e4m3 grid."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_grid(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 value of float64 ``x``, by its own arithmetic: 3 mantissa bits, exponents from -6, up to 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-20))).clamp(min=-6.0)
    step = torch.exp2(exponent - 3)
    return (torch.round(x / step) * step).clamp(-448.0, 448.0)


@pytest.mark.parametrize("op", [quantize.quantize_fp8_reference, quantize.quantize_fp8_triton])
@pytest.mark.parametrize("shape", [(1, 16), (3, 97), (2, 5, 33)])
def test_static_scale(op, shape):
    """Guards: multiplying by the scale, and values beyond 448 turning into NaN."""
    x = torch.randn(shape, device=DEVICE) * 20
    scale = torch.tensor(0.1, device=DEVICE)
    out = op(x, scale).double()
    exact = on_grid(x.double() / scale.double())
    assert (out.abs() == 448).any() or x.abs().max() < 44
    assert (out != exact).double().mean() < 0.01  # a float32 quotient may sit on the other side of a midpoint
    assert torch.allclose(out, exact, rtol=0.13)


@pytest.mark.parametrize(
    "op", [quantize.quantize_fp8_rowwise_reference, quantize.quantize_fp8_rowwise_triton]
)
@pytest.mark.parametrize("width", [130, 1100, 2048])
def test_scale_of_each_row(op, width):
    """Guards: one scale for the whole tensor or for a part of a row, and division by zero on an empty row."""
    x = (
        torch.randn(5, width, device=DEVICE)
        * torch.tensor([1e-3, 1.0, 50.0, 3.0, 0.0], device=DEVICE)[:, None]
    )
    codes, scale = op(x)
    assert torch.allclose(scale[:4], x[:4].abs().amax(1) / 448)
    assert torch.isfinite(codes.float()).all() and not codes[4].float().any()
    assert torch.equal(codes[:4].float().abs().amax(1), torch.full((4,), 448.0, device=DEVICE))
    error = (codes.float() * scale[:, None] - x).norm() / x.norm()
    assert error < 0.04
