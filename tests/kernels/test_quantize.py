"""FP8 quantisation of activations against exact float64 arithmetic on the e4m3 grid."""

from __future__ import annotations

import math

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWWISE = [quantize.quantize_fp8_rowwise_reference, quantize.quantize_fp8_rowwise_triton]


def on_grid(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 value of float64 ``x``, by its own arithmetic: 3 mantissa bits, exponents from -6, up to 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-20))).clamp(min=-6.0)
    step = torch.exp2(exponent - 3)
    return (torch.round(x / step) * step).clamp(-448.0, 448.0)


@pytest.mark.parametrize("op", [quantize.quantize_fp8_reference, quantize.quantize_fp8_triton])
@pytest.mark.parametrize("shape", [(1, 16), (3, 97), (2, 5, 33), (9, 1040)])
def test_static_scale(op, shape):
    """Guards: multiplying by the scale, and values beyond 448 turning into NaN."""
    x = torch.randn(shape, device=DEVICE) * 20
    scale = torch.tensor(0.1, device=DEVICE)
    out = op(x, scale).double()
    exact = on_grid(x.double() / scale.double())
    assert (out.abs() == 448).any() or x.abs().max() < 44
    assert (out != exact).double().mean() < 0.01  # a float32 quotient may sit on the other side of a midpoint
    assert torch.allclose(out, exact, rtol=0.13)


@pytest.mark.parametrize("op", ROWWISE)
@pytest.mark.parametrize("width", [130, 1100, 2048])
def test_scale_of_each_row(op, width):
    """Guards: one scale for the whole tensor or for a part of a row, and division by zero on an empty row."""
    x = (
        torch.randn(5, width, device=DEVICE)
        * torch.tensor([1e-3, 1.0, 50.0, 3.0, 0.0], device=DEVICE)[:, None]
    )
    codes, scale = op(x)
    wanted = x[:4].abs().amax(1) / 448
    assert (wanted <= scale[:4]).all() and (scale[:4] < 2 * wanted).all()
    assert torch.isfinite(codes.float()).all() and not codes[4].float().any()
    assert (codes[:4].float().abs().amax(1) >= 208).all()  # beyond 224, but for a float32 that rounds down
    error = (codes.float() * scale[:, None] - x).norm() / x.norm()
    assert error < 0.04


def smallest_power(largest: float) -> float:
    """The smallest power of two that is at least ``largest / 448`` and 2**-40, by exact arithmetic."""
    exponent = -40
    while 448 * 2.0**exponent < largest:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_a_row_is_the_smallest_power_of_two(dtype):
    """Guards: a binade too much or too little around 448 times a power, denormal scales, overflow of a huge row.

    Both ways of finding it agree to the last bit, on rows of every size.
    """
    around_floor, huge = range(-42, -37), range(116, 120)
    powers = [-149, -127, -126, -125, -80, -49, -48, *around_floor, -20, -1, 0, 1, 7, 30, 100, *huge]
    edges = 448.0 * torch.exp2(torch.tensor(powers, dtype=torch.float64))
    last_bit = torch.finfo(dtype).eps
    largest = torch.cat([edges * (1 - last_bit), edges, edges * (1 + last_bit), edges / 1.75, edges * 1.1])
    largest = largest.to(dtype)[largest.to(dtype).isfinite()]
    extremes = torch.tensor([0.0, 1e-45, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    largest = torch.cat([largest, extremes]).to(DEVICE)
    x = largest[:, None] * (2 * torch.rand(len(largest), 24, device=DEVICE) - 1).to(dtype)
    x[:, 5] = -largest
    (codes, scale), (other_codes, other_scale) = (op(x) for op in ROWWISE)
    assert scale.tolist() == [smallest_power(value) for value in largest.tolist()]
    assert torch.equal(scale, other_scale) and torch.equal(codes.float(), other_codes.float())
    exact = x.double() / scale.double()[:, None]
    assert exact.abs().max() <= 448
    assert torch.equal(codes.double(), on_grid(exact))


def test_infinite_values_saturate():
    """Guards: a scale that is infinite, zero or negative, which would make every code of the row NaN or zero."""
    x = torch.tensor([[1.0, -math.inf, 2.0**119 * 300]], device=DEVICE)
    for op in ROWWISE:
        codes, scale = op(x)
        assert scale.tolist() == [2.0**120] and codes.tolist() == [[0.0, -448.0, 144.0]]
