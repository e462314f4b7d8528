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
from outrider.kernels.quantize import (
    Fp8Form,
    Fp8Rows,
    Operand,
    empty_rows,
    quantize_rows_reference,
    row_scale,
    to_fp8,
)


class Normed(NamedTuple):
    """``y [T, M]`` in the model dtype; ``fp8``: the same in the form that the next product asked for, if in any."""

    y: torch.Tensor
    fp8: Fp8Rows | None

    @property
    def operand(self) -> Operand:
        """What that product reads."""
        return self.y if self.fp8 is None else self.fp8


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """Normalise the rows of ``x [T, M]``; with ``residual [T, M]``, add ``x`` to it in place and normalise the sum.

    ``weight [M]`` has the model dtype, in which the result is rounded before it takes ``form`` too. Arithmetic is
    float32 inside; the residual sum is rounded to the model dtype.
    """
    op = rms_norm_triton if on_gpu(x) else rms_norm_reference
    return op(x, weight, eps, residual, form)


def rms_norm_operand(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Operand:
    """``rms_norm(...).operand``, for a norm that is read by that product alone: nothing else is written."""
    if on_gpu(x) and form is not None:
        return _fp8_rows_triton(x, weight, eps, residual, form, None)
    return rms_norm(x, weight, eps, residual, form).operand


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """The contract of ``rms_norm`` in plain torch: the CPU path and the test oracle."""
    if residual is not None:
        x = residual.add_(x)
    if x.dtype == torch.float32:
        y = F.rms_norm(x, (x.shape[-1],), weight, eps)
    else:
        y = F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight
    return Normed(y, None if form is None else quantize_rows_reference(y, form))


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    fp8_ptr,
    scale_ptr,
    x_stride,
    residual_stride,
    num_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_FP8: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program normalises one row held whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if HAS_FP8 and not PER_ROW:
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
    if HAS_Y:
        tl.store(y_ptr + row * num_cols + cols, y, mask=mask)
    if HAS_FP8:
        y = y.to(tl.float32)
        if PER_ROW:
            scale = row_scale(y)
            tl.store(scale_ptr + row, scale)
        tl.store(fp8_ptr + row * num_cols + cols, to_fp8(y, scale), mask=mask)


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """Launch one program a row; see ``rms_norm``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if form is not None:
        return Normed(y, _fp8_rows_triton(x, weight, eps, residual, form, y))
    _launch(x, weight, eps, residual, y, None, per_row=False)
    return Normed(y, None)


def _fp8_rows_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    form: Fp8Form,
    y: torch.Tensor | None,
) -> Fp8Rows:
    """The norm in ``form``, and in ``y`` in the model dtype too unless that is None."""
    fp8 = empty_rows(x.shape, x.device, form)
    _launch(x, weight, eps, residual, y, fp8, per_row=form.scale is None)
    return fp8


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    fp8: Fp8Rows | None,
    per_row: bool,
) -> None:
    num_rows, num_cols = x.shape
    if num_rows == 0:
        return
    codes, scale = fp8 or (None, None)
    block = power_of_two_at_least(num_cols, 32)
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        residual,
        y,
        codes,
        scale,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_cols,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_Y=y is not None,
        HAS_FP8=fp8 is not None,
        PER_ROW=per_row,
        BLOCK=block,
        num_warps=_num_warps(block),
        **overlap_options(x.device, num_rows),
    )


def _num_warps(block: int) -> int:
    """Eight elements a thread and load, between one and sixteen warps."""
    return max(1, min(16, block // 512))


_ROW = {
    "x_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "y_ptr": "*bf16",
    "fp8_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
}
_SIZES = {"x_stride": "i32", "residual_stride": "i32", "num_cols": "i32", "eps": "fp32"}
_CONSTANTS = {"HAS_RESIDUAL": True, "HAS_FP8": True, "BLOCK": 8192}
AOT_SPECS = [
    (
        _rms_norm_kernel,
        _ROW | _SIZES,
        {**_CONSTANTS, "HAS_Y": has_y, "PER_ROW": per_row, "OVERLAP": not per_row},
    )
    for has_y, per_row in ((True, True), (True, False), (False, True))
]
