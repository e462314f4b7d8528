"""RMS norm, with the residual addition before it and the FP8 quantization after it fused in.

Called by the models for every norm over the hidden size. Never used for the per-head norm of queries and
keys: that one is part of ``rope``. Rounding follows the reference implementation of the model in
transformers: the normalised value is cast to the model dtype *before* it is multiplied by the weight.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.overlap import overlap_options, wait_for_inputs
from outrider.kernels.quantize import (
    Fp8Form,
    Fp8Rows,
    Operand,
    Product,
    ScaledRows,
    apply_scale,
    empty_rows,
    load_tiles,
    quantize_rows_reference,
    row_scale,
    to_fp8,
)


def _tile(num_cols: int, per_row: bool) -> tuple[int, int]:
    """Columns of a tile and warps: the whole row, or with a scale a row parts of it, which waste no threads.

    They decide in which order squares are added up: each form has one tile for steps of any size.

    H200, 2026-11-26, with the rows in e4m3, 400 / 1,315 / 8,192 rows of 5,120: with a scale a row 6.9 / 19.5 / 97.5 us,
    parts of 512 7.0 / 19.2 / 97.5, whole rows in 16 warps 9.7 / 23.1 / 117.6; with a given scale 9.1 / 22.5 / 110.4,
    which is not tuned: benchmarks/results/trials_h200.txt
    """
    block = power_of_two_at_least(num_cols, 32)
    if per_row:
        block = min(block, 1024)
        return block, max(1, block // 256)
    return block, max(1, min(16, block // 512))


class Normed(NamedTuple):
    """``y [T, M]`` in the model dtype; ``fp8``: the same in the form that the next product asked for, if in any."""

    y: torch.Tensor
    fp8: Fp8Rows | None

    @property
    def operand(self) -> Operand:
        """What that product reads."""
        return self.y if self.fp8 is None else self.fp8


class LazySum(NamedTuple):
    """``a + b``, both ``[T, M]`` in the model dtype, to which it is rounded: made by the norm that reads it."""

    a: Product
    b: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """``(T, M)``."""
        return self.a.shape


Addend = Product | LazySum
"""What a part of a layer adds to the residual."""


def summed(x: Addend) -> torch.Tensor:
    """``x`` as one tensor."""
    if isinstance(x, LazySum):
        return summed(x.a) + x.b
    return x.tensor() if isinstance(x, ScaledRows) else x


def rms_norm(
    x: Addend,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """Normalise the rows of ``x [T, M]``; with ``residual [T, M]``, add ``x`` to it in place and normalise the sum.

    ``weight [M]`` has the model dtype, in which the result is rounded before it takes ``form`` too. Arithmetic is
    float32 inside; the residual sum is rounded to the model dtype.
    """
    op = rms_norm_triton if on_gpu(weight) else rms_norm_reference
    return op(x, weight, eps, residual, form)


def rms_norm_operand(
    x: Addend,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Operand:
    """``rms_norm(...).operand``, for a norm that is read by that product alone: nothing else is written."""
    if on_gpu(weight) and form is not None:
        return rms_norm_fp8_triton(x, weight, eps, residual, form)
    return rms_norm(x, weight, eps, residual, form).operand


def rms_norm_reference(
    x: Addend,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """The contract of ``rms_norm`` in plain torch: the CPU path and the test oracle."""
    x = summed(x)
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
    x_scale_ptr,
    second_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    fp8_ptr,
    scale_ptr,
    x_stride,
    second_stride,
    residual_stride,
    num_cols,
    eps,
    IS_SCALED: tl.constexpr,
    IS_SUM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_FP8: tl.constexpr,
    PER_ROW: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program normalises one row held whole in registers: everything is loaded before anything is written."""
    row = tl.program_id(0).to(tl.int64)
    # Loaded late they leave registers to more programs, which helps where more is written than the norm.
    WEIGHTS_FIRST: tl.constexpr = OVERLAP or not HAS_FP8
    if WEIGHTS_FIRST:
        weights = load_tiles(weight_ptr, num_cols, TILES, BLOCK)
    if HAS_FP8 and not PER_ROW:
        scale = tl.load(scale_ptr)
    wait_for_inputs(OVERLAP)
    rows = load_tiles(x_ptr + row * x_stride, num_cols, TILES, BLOCK)
    if IS_SCALED:
        x_scale = tl.load(x_scale_ptr + row)
    if IS_SUM:
        seconds = load_tiles(second_ptr + row * second_stride, num_cols, TILES, BLOCK)
    if HAS_RESIDUAL:
        residuals = load_tiles(residual_ptr + row * residual_stride, num_cols, TILES, BLOCK)
    sums = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TILES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        x = rows[i]
        if IS_SCALED:
            x = apply_scale(x, x_scale)
        if IS_SUM:
            x = (x.to(tl.float32) + seconds[i].to(tl.float32)).to(x.dtype)
        if HAS_RESIDUAL:
            x = (x.to(tl.float32) + residuals[i].to(tl.float32)).to(x.dtype)
            tl.store(residual_ptr + row * residual_stride + cols, x, mask=cols < num_cols)
        wide = x.to(tl.float32)
        squares += wide * wide
        sums = sums + (x,)
    inv_rms = tl.rsqrt(tl.sum(squares, axis=0) / num_cols + eps)
    if not WEIGHTS_FIRST:
        weights = load_tiles(weight_ptr, num_cols, TILES, BLOCK)
    normed = ()
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TILES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        x = sums[i]
        y = ((x.to(tl.float32) * inv_rms).to(x.dtype).to(tl.float32) * weights[i].to(tl.float32)).to(x.dtype)
        if HAS_Y:
            tl.store(y_ptr + row * num_cols + cols, y, mask=cols < num_cols)
        if PER_ROW:
            largest = tl.maximum(largest, tl.abs(y.to(tl.float32)))
        normed = normed + (y,)
    if PER_ROW:
        scale = row_scale(largest)
        tl.store(scale_ptr + row, scale)
    if HAS_FP8:
        for i in tl.static_range(TILES):
            cols = i * BLOCK + tl.arange(0, BLOCK)
            codes = to_fp8(normed[i].to(tl.float32), scale)
            tl.store(fp8_ptr + row * num_cols + cols, codes, mask=cols < num_cols)


def rms_norm_triton(
    x: Addend,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    form: Fp8Form | None = None,
) -> Normed:
    """Launch one program a row; see ``rms_norm``."""
    y = torch.empty(x.shape, dtype=weight.dtype, device=weight.device)
    return Normed(y, _launch(x, weight, eps, residual, form, y))


def rms_norm_fp8_triton(
    x: Addend, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, form: Fp8Form
) -> Fp8Rows:
    """The same in ``form`` alone."""
    fp8 = _launch(x, weight, eps, residual, form, None)
    assert fp8 is not None
    return fp8


def _launch(
    x: Addend,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    form: Fp8Form | None,
    y: torch.Tensor | None,
) -> Fp8Rows | None:
    """Write ``y``, if there is one, and rows in ``form``, if there is one: those are returned."""
    x, second = x if isinstance(x, LazySum) else (x, None)
    x, x_scale = (x.y, x.scale) if isinstance(x, ScaledRows) else (x, None)
    num_rows, num_cols = x.shape
    fp8 = None if form is None else empty_rows(x.shape, x.device, form)
    if num_rows == 0:
        return fp8
    codes, scale = fp8 or (None, None)
    per_row = form is not None and form.scale is None
    block, num_warps = _tile(num_cols, per_row)
    _rms_norm_kernel[(num_rows,)](
        x,
        x_scale,
        second,
        weight,
        residual,
        y,
        codes,
        scale,
        x.stride(0),
        0 if second is None else second.stride(0),
        0 if residual is None else residual.stride(0),
        num_cols,
        eps,
        IS_SCALED=x_scale is not None,
        IS_SUM=second is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_Y=y is not None,
        HAS_FP8=fp8 is not None,
        PER_ROW=per_row,
        TILES=ceil_div(num_cols, block),
        BLOCK=block,
        num_warps=num_warps,
        **overlap_options(x.device, num_rows),
    )
    return fp8


_ROW = {
    "x_ptr": "*bf16",
    "x_scale_ptr": "*fp32",
    "second_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "y_ptr": "*bf16",
    "fp8_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
}
_SIZES = {
    "x_stride": "i32",
    "second_stride": "i32",
    "residual_stride": "i32",
    "num_cols": "i32",
    "eps": "fp32",
}
_FLAGS = {"IS_SUM": True, "HAS_RESIDUAL": True, "HAS_FP8": True}


def _aot_spec(has_y: bool, per_row: bool, overlap: bool, scaled: bool = False):
    block, num_warps = _tile(5120, per_row)
    tile = {"TILES": ceil_div(5120, block), "BLOCK": block, "OVERLAP": overlap}
    constants = _FLAGS | tile | {"IS_SCALED": scaled, "HAS_Y": has_y, "PER_ROW": per_row}
    return _rms_norm_kernel, _ROW | _SIZES, constants, {"num_warps": num_warps}


AOT_SPECS = [
    _aot_spec(True, True, False),
    _aot_spec(True, True, False, scaled=True),
    _aot_spec(False, True, True),
    _aot_spec(True, False, True),
]
