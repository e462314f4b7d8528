"""NVFP4 weights against a decoder written out code by code, and products against float64."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels import nvfp4
from outrider.kernels.nvfp4_decode import dequantize_nvfp4_triton, nvfp4_to_fp8_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.bfloat16 if GPU else torch.float32  # the interpreter cannot multiply bfloat16 blocks
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(*shape[:-1], shape[-1] // 16, device=DEVICE) * 400 + 1).to(torch.float8_e4m3fn)
    return packed, scale, torch.tensor(0.003, device=DEVICE)


def decode_slowly(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Element by element in float64: low nibble first, bit 3 the sign, one scale for 16 elements."""
    rows = []
    for row, row_scale in zip(
        packed.flatten(0, -2).tolist(), scale.double().flatten(0, -2).tolist(), strict=True
    ):
        codes = [nibble for byte in row for nibble in (byte & 15, byte >> 4)]
        values = [
            (-1 if code & 8 else 1) * MAGNITUDES[code & 7] * row_scale[i // 16]
            for i, code in enumerate(codes)
        ]
        rows.append(values)
    exact = torch.tensor(rows, dtype=torch.float64, device=packed.device) * global_scale.double()
    return exact.view(*packed.shape[:-1], -1)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("op", [nvfp4.dequantize_nvfp4, dequantize_nvfp4_triton])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 48), (37, 80)])
def test_decoding(op, shape):
    """Guards: nibble order, sign bit, and which block a scale belongs to."""
    weights = random_weights(*shape)
    assert error(op(*weights, torch.float32), decode_slowly(*weights)) < 1e-6


def test_decoding_to_fp8_rounds_once():
    """Guards: the power of two that keeps 6 · 448 inside e4m3, and rounding of more than the last bit."""
    packed, scale, _ = random_weights(9, 64)
    exact = decode_slowly(packed, scale, torch.tensor(1.0, device=DEVICE))
    codes = nvfp4_to_fp8_triton(packed, scale).double() * 8
    assert torch.isfinite(codes).all()
    assert ((codes - exact).abs() <= exact.abs() / 16 + 2.0**-7).all()


def test_weight_only_product():
    """Guards: the scales of a weight-only product; weights stay exact."""
    weights = random_weights(40, 288)
    x = torch.randn(5, 288, device=DEVICE, dtype=WIDE)
    exact = x.double() @ decode_slowly(*weights).T
    for op in (nvfp4.nvfp4_linear, nvfp4.nvfp4_linear_reference):
        assert error(op(x, *weights), exact) < (4e-3 if GPU else 1e-5)


def test_rounding_to_e2m1():
    """Guards: ties that round away from the even code, and saturation."""
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 100.0, -0.75, 0.26, -1.3])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, 0.5, -1.5])
    assert torch.equal(nvfp4.round_to_e2m1(x), expected)


def test_activation_quantisation_error_is_that_of_four_bits():
    """Guards: a block scale of the wrong block, and a global scale applied twice."""
    x = torch.randn(7, 160)
    input_scale = x.abs().max() / (6 * 448)
    values, scale = nvfp4.quantize_nvfp4_activations(x, input_scale)
    back = values.view(7, 10, 16) * scale.float()[..., None] * input_scale
    assert 0.03 < error(back.view(7, 160), x.double()) < 0.15
