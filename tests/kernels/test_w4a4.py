"""Four-bit activations code by code, and W4A4 products against float64 on the same codes.

In the interpreter only the tensor core's own product is emulated (``scaled_dot``); loads, masks, splits, groups and
epilogues are the kernel's. The instruction itself is checked in ``test_aot``, and on a Blackwell GPU by these tests.
"""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import scaled_dot  # noqa: F401
import torch
import triton
from test_moe import slow_moe
from test_nvfp4 import DEVICE, GPU, MAGNITUDES, WIDE, decode_slowly, error, random_weights

from outrider.kernels import moe
from outrider.kernels.moe_w4a4 import moe_w4a4_reference, moe_w4a4_triton
from outrider.kernels.w4a4 import (
    Fp4Rows,
    Fp4Tile,
    Fp4Weight,
    quantize_nvfp4_reference,
    quantize_nvfp4_triton,
    w4a4_linear_reference,
    w4a4_linear_triton,
)

QUANTIZERS = [quantize_nvfp4_reference, quantize_nvfp4_triton]
ONE = torch.tensor(1.0, device=DEVICE)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Triton 3.9 runs these products in bf16 where there are no FP4 tensor cores, exactly; 3.6 cannot compile them there.
NO_FP4 = GPU and torch.cuda.get_device_capability()[0] < 10 and TRITON < (3, 9)
needs_fp4 = pytest.mark.skipif(
    NO_FP4, reason="this GPU has no FP4 tensor cores and this Triton no substitute"
)
TOLERANCE = 4e-3 if GPU else 1e-5


def fp4_weight(*shape: int, global_scale: float = 1.2e-4, input_scale: float = 2e-3) -> Fp4Weight:
    packed, scale, _ = random_weights(*shape)
    scales = (torch.tensor(value, device=DEVICE) for value in (global_scale, input_scale))
    return Fp4Weight(packed, scale, *scales)


def decode(rows: Fp4Rows, input_scale: torch.Tensor) -> torch.Tensor:
    return decode_slowly(rows.codes, rows.block_scale, input_scale)


def slow_linear(x: torch.Tensor, weight: Fp4Weight) -> torch.Tensor:
    """The quantized activations times the decoded weights in float64."""
    rows = quantize_nvfp4_reference(x, weight.input_scale)
    wide = decode_slowly(weight.codes, weight.block_scale, weight.global_scale)
    return decode(rows, weight.input_scale) @ wide.T


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_codes_of_one_block(quantize):
    """Guards: ties that round away from the even code, the sign of zero, which nibble comes first, saturation."""
    inputs = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.75, 0.26, -1.3, 0.24, 5.25, -6.0, 0.0, -0.1]
    x = torch.tensor([inputs], device=DEVICE, dtype=WIDE)
    rows = quantize(x, ONE)
    assert rows.block_scale.float().tolist() == [[1.0]]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -1.0, 0.5, -1.5, 0.0, 6.0, -6.0, 0.0, -0.0]
    nibbles = [nibble for byte in rows.codes[0].tolist() for nibble in (byte & 15, byte >> 4)]
    assert [MAGNITUDES[n & 7] for n in nibbles] == [abs(value) for value in expected]
    assert [n >> 3 for n in nibbles] == [int(str(value).startswith("-")) for value in expected]


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_scales_of_blocks(quantize):
    """Guards: a scale that overflows e4m3 to NaN, division by the scale 0, a scale rounded after it was used."""
    x = torch.zeros(1, 64, device=DEVICE, dtype=WIDE)
    x[0, 3], x[0, 20], x[0, 33] = (
        1e6,
        6 * 1.07,
        1e-6,
    )  # beyond 448; between two scales; rounds to 0; all zeros
    rows = quantize(x, ONE)
    assert rows.block_scale.float().tolist() == [[448.0, 1.125, 0.0, 0.0]]
    assert decode(rows, ONE)[0].nonzero().flatten().tolist() == [3, 20]
    assert float(decode(rows, ONE)[0, 3]) == 448 * 6


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_nan_is_kept(quantize):
    """Guards: a NaN that quantising would turn into a number, so that nobody notices the broken request."""
    x = torch.ones(2, 32, device=DEVICE, dtype=WIDE)
    x[1, 17] = float("nan")
    assert quantize(x, ONE).block_scale.float().isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(("tokens", "depth"), [(1, 16), (3, 80), (7, 2080)])
@pytest.mark.parametrize("input_scale", [1.0, 3.7e-3])
def test_quantizer_agrees_with_its_reference(tokens, depth, input_scale):
    """Guards: the kernel's own rounding, ragged tails of a row; both are exact, so every bit is compared."""
    x = (torch.randn(tokens, depth, device=DEVICE) * torch.rand(tokens, 1, device=DEVICE)).to(WIDE)
    scale = torch.tensor(input_scale, device=DEVICE)
    found, wanted = quantize_nvfp4_triton(x, scale), quantize_nvfp4_reference(x, scale)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.block_scale.view(torch.uint8), wanted.block_scale.view(torch.uint8))


def test_quantising_is_worth_four_bits():
    """Guards: a block scale of the wrong block, and a global scale applied twice or not at all."""
    x = torch.randn(7, 160, device=DEVICE).to(WIDE)
    input_scale = x.abs().max().float() / (6 * 448)
    for quantize in QUANTIZERS:
        assert 0.03 < error(decode(quantize(x, input_scale), input_scale), x.double()) < 0.15


@needs_fp4
@pytest.mark.parametrize(("tokens", "outputs", "depth"), [(1, 128, 256), (5, 40, 96), (21, 200, 352)])
@pytest.mark.parametrize("tile", [Fp4Tile(16, 128, 2, 4), Fp4Tile(16, 128, 2, 4, split_k=2)])
def test_dense_product(tokens, outputs, depth, tile):
    """Guards: scales of the wrong row or block, ragged rows, outputs and depth, a global scale left out."""
    weight = fp4_weight(outputs, depth)
    x = torch.randn(tokens, depth, device=DEVICE, dtype=WIDE)
    exact = slow_linear(x, weight)
    assert error(w4a4_linear_reference(x, weight), exact) < TOLERANCE
    assert error(w4a4_linear_triton(x, weight, tile), exact) < TOLERANCE


@needs_fp4
@pytest.mark.parametrize(("tokens", "top_k", "expert_range"), [(1, 1, None), (37, 1, None), (9, 2, (1, 3))])
@pytest.mark.parametrize("split_k", [1, 2])
def test_experts(tokens, top_k, expert_range, split_k):
    """Guards: quantising before the score, gate and up mixed up, rows of another expert, empty experts."""
    count = expert_range[1] if expert_range else 5
    w13, w2 = fp4_weight(count, 2 * 96, 160, input_scale=1e-3), fp4_weight(count, 160, 96)
    x = torch.randn(tokens, 160, device=DEVICE, dtype=WIDE)
    ids, scores = moe.route_reference(torch.randn(tokens, 5, device=DEVICE), top_k)
    if expert_range:
        ids[0, 0] = expert_range[0]  # at least one row is held here
    arguments = (x, ids, scores, w13, w2, expert_range)
    reference = moe_w4a4_reference(*arguments).double()
    wide = (decode_slowly(w.codes, w.block_scale, w.global_scale) for w in (w13, w2))
    exact = slow_moe(x, ids, scores, *wide, expert_range[0] if expert_range else 0)
    assert 0.02 < error(reference, exact) < 0.3  # two roundings to four bits
    tiles = Fp4Tile(16, 128, 2, 4), Fp4Tile(16, 128, 2, 4, split_k=split_k)
    assert error(moe_w4a4_triton(*arguments, tiles), reference) < (0.05 if GPU else 1e-5)
