"""NVFP4 (ModelOpt) linear layers: e2m1 weights in blocks of 16 with an e4m3 scale each.

Called by the NVFP4 layers of ``quant``. Weights keep the checkpoint's layout: byte m of a row holds element
2m in its low nibble and 2m+1 in its high one, so a little-endian 64-bit word is exactly one scale block.
Weight-only arithmetic is exact: e2m1 x e4m3 has at most six significant bits and fits bf16.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F

from outrider.kernels._dispatch import on_gpu
from outrider.kernels.gemm import fp8_linear, lone_row_tile
from outrider.kernels.gemv import gemv_triton
from outrider.kernels.nvfp4_decode import FP8_SHIFT, dequantize_nvfp4_triton, nvfp4_to_fp8_triton
from outrider.kernels.quantize import (
    FP8_MAX,
    Fp8Form,
    Fp8Rows,
    Operand,
    ScaledRows,
    quantize_fp8_rowwise,
)

BLOCK_SIZE = 16
"""Elements along the input dimension that share one e4m3 scale (NVFP4 format)."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each 4-bit code; bit 3 is the sign (MODEL_SPEC 2.3)."""

E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes; a tie goes to the even code."""


class Nvfp4Path(StrEnum):
    """What NVFP4 layers become on a device; ``docs/adr`` has the measurements behind it."""

    W4A4 = "w4a4, weights and activations on fp4 tensor cores"
    WEIGHT_ONLY = "weight-only, exact weights"
    FP8 = "weight-only, dense as fp8 rows, experts decoded to fp8 in registers"


_PATH_OF_CAPABILITY = {9: Nvfp4Path.FP8, 10: Nvfp4Path.W4A4, 12: Nvfp4Path.W4A4}
"""By major compute capability: Hopper has FP8 tensor cores and no FP4 ones; 10 and 12 are Blackwell."""


def nvfp4_path(device: torch.device) -> Nvfp4Path:
    """The path of ``device``."""
    if device.type != "cuda":
        return Nvfp4Path.WEIGHT_ONLY
    return _PATH_OF_CAPABILITY.get(torch.cuda.get_device_capability(device)[0], Nvfp4Path.WEIGHT_ONLY)


def nvfp4_linear(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    """``x[T, K] @ W.T -> [T, N]`` in ``x``'s dtype, ``W`` = ``dequantize_nvfp4`` of the other three.

    ``packed`` u8 [N, K/2], ``block_scale`` e4m3 [N, K/16], ``global_scale`` f32 of one element. Every call decodes
    the whole matrix to memory: the GPUs that are served well take another path (``nvfp4_path``).
    """
    if not on_gpu(x):
        return nvfp4_linear_reference(x, packed, block_scale, global_scale)
    return F.linear(x, dequantize_nvfp4_triton(packed, block_scale, global_scale, x.dtype))


def nvfp4_to_fp8_rows(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 weights [N, K] once and for all as ``(e4m3 [N, K], scale f32 [N])`` for ``fp8_rows_linear``.

    The row scale is a power of two times ``global_scale`` (one element, or [N]): half of the products of a block
    scale and an e2m1 value are then exact in e4m3, and the rounding noise is 1.9 % instead of 2.6 %.
    """
    if on_gpu(packed):
        weight = nvfp4_to_fp8_triton(packed, block_scale)
    else:
        shrunk = torch.tensor(1.0 / (1 << FP8_SHIFT))
        weight = dequantize_nvfp4(packed, block_scale, shrunk, torch.float32).to(torch.float8_e4m3fn)
    scale = global_scale.reshape(-1) * float(1 << FP8_SHIFT)
    return weight, scale.expand(packed.shape[0]).contiguous()


def fp8_rows_form(num_rows: int, weight: torch.Tensor) -> Fp8Form | None:
    """The form in which ``fp8_rows_linear`` multiplies this many rows: e4m3 with a scale a row.

    A single row on a GPU stays as it is: its product needs no tensor cores, and rounding it would cost a launch.
    """
    return Fp8Form() if lone_row_tile(num_rows, weight) is None else None


def fp8_rows_linear(
    x: Operand, weight: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """``x[T, K] @ W.T -> [T, N]`` in ``out_dtype``; ``x`` in ``fp8_rows_form`` already, or put into it here."""
    if not isinstance(x, Fp8Rows):
        lone = lone_row_tile(x.shape[0], weight)
        if lone is not None:
            return gemv_triton(x.contiguous(), weight, None, w_scale, out_dtype, lone)
        x = quantize_fp8_rowwise(x)
    return fp8_linear(x.codes, weight, x.scale, w_scale, out_dtype)


def fp8_rows_unscaled(
    x: Operand, weight: torch.Tensor, w_scale: torch.Tensor, out_dtype: torch.dtype
) -> ScaledRows:
    """``fp8_rows_linear`` whose reader applies the scales of the rows; ``w_scale`` must hold one value alone."""
    rows = x if isinstance(x, Fp8Rows) else quantize_fp8_rowwise(x)
    return ScaledRows(fp8_linear(rows.codes, weight, None, w_scale, out_dtype, w_scale[:1]), rows.scale)


def nvfp4_linear_reference(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    """Plain-torch weight-only product."""
    return F.linear(x, dequantize_nvfp4(packed, block_scale, global_scale, x.dtype))


def unpack_e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of ``packed`` u8 [..., K/2] as unscaled values [..., K]; low nibble first."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return torch.tensor(E2M1_VALUES, dtype=dtype, device=packed.device)[codes.long()]


def dequantize_nvfp4(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [..., K] in ``dtype`` from u8 [..., K/2], e4m3 [..., K/16] and an f32 scale for all."""
    values = unpack_e2m1(packed, torch.float32)
    blocks = values.unflatten(-1, (-1, BLOCK_SIZE)) * (block_scale.float() * global_scale)[..., None]
    return blocks.flatten(-2).to(dtype)


def quantize_nvfp4_activations(
    x: torch.Tensor, input_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x[T, K]`` as NVFP4 hardware sees it: ``(values f32[T, K] on the e2m1 grid, block scale e4m3[T, K/16])``.

    ``x ≈ values · block_scale · input_scale``; an all-zero block has scale 0 (MODEL_SPEC 2.3, W4A4).
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))
    wanted = blocks.abs().amax(-1) / (6.0 * input_scale)
    block_scale = wanted.clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    step = (block_scale.float() * input_scale)[..., None]
    scaled = torch.where(step > 0, blocks / step, torch.zeros_like(blocks).copysign(blocks))
    return round_to_e2m1(scaled).flatten(-2), block_scale


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 value, ties to the even code, saturating at ±6; same shape and dtype as ``x``."""
    magnitude = x.abs()
    bounds = torch.tensor(E2M1_BOUNDS, dtype=x.dtype, device=x.device)
    below = torch.bucketize(magnitude, bounds, right=False)  # a tie stays at the lower code
    on_tie = (magnitude == bounds[below.clamp(max=6)]) & (below % 2 == 1)
    code = below + on_tie
    values = torch.tensor(E2M1_VALUES[:8], dtype=x.dtype, device=x.device)
    return values[code].copysign(x)
