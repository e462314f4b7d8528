"""silu(gate) * up against float64 arithmetic."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.activation import silu_mul_reference, silu_mul_triton, swiglu
from outrider.kernels.quantize import Fp8Form, quantize_fp8_rowwise_reference, quantize_fp8_rowwise_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [silu_mul_reference, silu_mul_triton]


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1536), (3, 5), (2, 2100), (0, 8)])
def test_gate_is_the_first_half(op, dtype, rows, cols):
    """Guards: swapped halves, and columns lost at the border of a block."""
    x = torch.randn(rows, 2 * cols, dtype=dtype, device=DEVICE) * 3
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + torch.exp(-gate)) * up
    out = op(x)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * 1.01
    assert torch.allclose(out.double(), exact, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("op", PATHS)
def test_fp8_output(op):
    """Guards: multiplying by the scale, and overflow to NaN instead of 448."""
    x = torch.randn(5, 2 * 70, dtype=torch.bfloat16, device=DEVICE) * 8
    scale = torch.tensor(0.05, device=DEVICE)
    out, out_scale = op(x, Fp8Form(scale))
    assert out_scale is scale
    exact = (swiglu(x.double()).bfloat16().double() / 0.05).clamp(-448, 448)
    assert float(exact.max()) == 448
    assert torch.allclose(out.double(), exact, rtol=2**-4 * 1.2, atol=2**-9)


@pytest.mark.parametrize(
    ("op", "quantize"),
    [
        (silu_mul_reference, quantize_fp8_rowwise_reference),
        (silu_mul_triton, quantize_fp8_rowwise_triton),
    ],
)
@pytest.mark.parametrize(("rows", "cols"), [(1, 70), (4, 2100), (0, 8)])
def test_a_scale_a_row_is_that_of_the_rounded_product(op, quantize, rows, cols):
    """Guards: a scale of a block of columns, of the product before its rounding, or shared by rows."""
    x = torch.randn(rows, 2 * cols, dtype=torch.bfloat16, device=DEVICE) * 8
    x[1:2] = 0
    out, expected = op(x, Fp8Form()), quantize(op(x))
    assert torch.equal(out.codes.float(), expected.codes.float())
    assert torch.equal(out.scale, expected.scale)
