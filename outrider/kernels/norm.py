"""RMS norm, with the residual addition before it and the FP8 quantization after it fused in.

Called by the models for every norm over the hidden size. Never used for the per-head norm of queries and
keys: that one is part of ``rope``. Rounding follows the reference implementation of the model in
transformers: the normalised value is cast to the model dtype *before* it is multiplied by the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import on_gpu, power_of_two_at_least
from outrider.kernels.overlap import overlap_options, wait_for_inputs
from outrider.kernels.quantize import quantize_fp8_reference, to_fp8


class Normed(NamedTuple):
    """``y [T, M]`` in the model dtype; ``y_fp8 [T, M]`` float8_e4m3fn when a scale was given."""

    y: torch.Tensor
    y_fp8: torch.Tensor | None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    fp8_scale: torch.Tensor | None = None,
) -> Normed:
    """Normalise the rows of ``x [T, M]``; with ``residual [T, M]``, add ``x`` to it in place and normalise the sum.

    ``weight [M]`` has the model dtype. ``fp8_scale`` is a float32 scalar tensor: ``y_fp8 = y / fp8_scale``,
    clamped to +-448. Arithmetic is float32 inside; the residual sum is rounded to the model dtype.
    """
    if on_gpu(x):
        return rms_norm_triton(x, weight, eps, residual, fp8_scale)
    return rms_norm_reference(x, weight, eps, residual, fp8_scale)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    fp8_scale: torch.Tensor | None = None,
) -> Normed:
    """The contract of ``rms_norm`` in plain torch: the CPU path and the test oracle."""
    if residual is not None:
        x = residual.add_(x)
    if x.dtype == torch.float32:
        y = F.rms_norm(x, (x.shape[-1],), weight, eps)
    else:
        y = F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight
    if fp8_scale is None:
        return Normed(y, None)
    return Normed(y, quantize_fp8_reference(y, fp8_scale))


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    y_fp8_ptr,
    scale_ptr,
    x_stride,
    residual_stride,
    num_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program normalises one row held whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if HAS_FP8:
        scale = tl.load(scale_ptr)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        old = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + old.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + row * residual_stride + cols, x, mask=mask)
    wide = x.to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(wide * wide, axis=0) / num_cols + eps)
    y = ((wide * inv_rms).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + row * num_cols + cols, y, mask=mask)
    if HAS_FP8:
        tl.store(y_fp8_ptr + row * num_cols + cols, to_fp8(y.to(tl.float32), scale), mask=mask)


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    fp8_scale: torch.Tensor | None = None,
) -> Normed:
    """Launch one program a row; see ``rms_norm``."""
    num_rows, num_cols = x.shape
    y = torch.empty((num_rows, num_cols), dtype=x.dtype, device=x.device)
    y_fp8 = None if fp8_scale is None else torch.empty_like(y, dtype=torch.float8_e4m3fn)
    if num_rows == 0:
        return Normed(y, y_fp8)
    block = power_of_two_at_least(num_cols, 32)
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        residual,
        y,
        y_fp8,
        fp8_scale,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_cols,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_FP8=fp8_scale is not None,
        BLOCK=block,
        num_warps=_num_warps(block),
        **overlap_options(x.device, num_rows),
    )
    return Normed(y, y_fp8)


def _num_warps(block: int) -> int:
    """Eight elements a thread and load, between one and sixteen warps."""
    return max(1, min(16, block // 512))


_ROW = {
    "x_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "y_ptr": "*bf16",
    "scale_ptr": "*fp32",
    "y_fp8_ptr": "*fp8e4nv",
}
_SIZES = {
    "residual_ptr": "*bf16",
    "x_stride": "i32",
    "residual_stride": "i32",
    "num_cols": "i32",
    "eps": "fp32",
}
AOT_SPECS = [
    (
        _rms_norm_kernel,
        {**_ROW, **_SIZES},
        {"HAS_RESIDUAL": True, "HAS_FP8": True, "BLOCK": 8192, "OVERLAP": True},
    )
]
