"""Activations to FP8 (e4m3): with a calibrated scale, or with a scale per row found on the spot.

Called by the quantised linears, by the MoE kernels' launchers and, for what they write themselves, by norms and
activations. Never touches weights. The scale of a row is a power of two: it costs no digit of a floating-point code,
and whoever reads a product may apply it as exactly as the product itself would (``ScaledRows``).
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu, power_of_two_at_least

FP8_MAX = 448.0
"""Largest finite e4m3 value. A cast beyond it gives NaN, so values are clamped first."""

MIN_ROW_SCALE = 2.0**-40
"""Floor of a per-row scale, so that an all-zero row divides by something."""


class QuantizeTile(NamedTuple):
    """Launch constants: most values of a tile, warps."""

    values: int
    warps: int


FLAT_TILE, ROW_TILE = QuantizeTile(4096, 8), QuantizeTile(1024, 4)
"""With a given scale, and with a scale a row.

H200, 2026-11-26, a scale a row, 400 / 1,315 / 8,192 rows of 5,120: 4.0 / 7.8 / 34.1 us, whole rows 4.3 / 8.5 / 38.3:
trials_h200.txt. A given scale: not tuned; 2026-11-27, before groups, value by value, 512 rows of 5,120 14.3 us, 8,192
148: kernels_h200.json; with the vectors that groups give back 2.9 and 31.6 on 2026-11-23: kernels_gemm_h200.json
"""


@dataclass(frozen=True, slots=True)
class Fp8Form:
    """The form in which a product takes its input when that is not the model dtype: e4m3 with a scale.

    ``scale``: the calibrated one (f32 of one element), or None for a scale a row, found in the row itself.
    """

    scale: torch.Tensor | None = None


class Fp8Rows(NamedTuple):
    """``x[T, K] = codes · scale``: ``codes`` e4m3 [T, K], ``scale`` f32 of one element or [T], one a row."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """``(T, K)``."""
        return self.codes.shape


Operand = torch.Tensor | Fp8Rows
"""What a product reads: ``x[T, K]`` in the model dtype, or in the ``Fp8Form`` that it asked for."""


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """``y · scale [T, N]``, to be multiplied and rounded to ``y``'s dtype by the kernel that reads it.

    ``y [T, N]``: a product in the model dtype; ``scale`` f32 [T]: powers of two, those of the rows that it was made of.
    """

    y: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """``(T, N)``."""
        return self.y.shape

    def __getitem__(self, rows: torch.Tensor) -> ScaledRows:
        """The ``rows`` int64 ``[R]`` alone."""
        return ScaledRows(self.y[rows], self.scale[rows])

    def tensor(self) -> torch.Tensor:
        """The same ``[T, N]`` as a tensor."""
        return (self.y.float() * self.scale[:, None]).to(self.y.dtype)


Product = torch.Tensor | ScaledRows
"""What a product gives: ``y[T, N]`` in the model dtype, or, to readers that apply scales, without those of its rows."""


def quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``e4m3(clamp(x / scale, ±448))`` in float32 arithmetic; same shape as ``x``.

    ``scale`` is a float32 tensor of one element (ModelOpt's ``input_scale``), never read on the host.
    """
    return quantize_fp8_triton(x, scale) if on_gpu(x) else quantize_fp8_reference(x, scale)


def quantize_fp8_rowwise(x: torch.Tensor) -> Fp8Rows:
    """``x[T, K]`` to e4m3 with one scale a row: ``amax(row) / 448``, rounded up to a power of two."""
    return quantize_fp8_rowwise_triton(x) if on_gpu(x) else quantize_fp8_rowwise_reference(x)


def quantize_fp8_reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Plain-torch ``quantize_fp8``."""
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_fp8_rowwise_reference(x: torch.Tensor) -> Fp8Rows:
    """Plain-torch ``quantize_fp8_rowwise``."""
    largest = x.float().abs().amax(-1).clamp_(FP8_MAX * MIN_ROW_SCALE, torch.finfo(torch.float32).max)
    mantissa, exponent = torch.frexp(largest)  # from 0.5 to below 1; that of 448 is 0.875, its exponent 9
    scale = torch.ldexp(torch.ones_like(largest), exponent - 9 + (mantissa > 0.875))
    return Fp8Rows(quantize_fp8_reference(x, scale[:, None]), scale)


def quantize_rows_reference(x: torch.Tensor, form: Fp8Form) -> Fp8Rows:
    """``x[T, K]`` in ``form``, in plain torch: what the kernels that write such rows are held to."""
    if form.scale is None:
        return quantize_fp8_rowwise_reference(x)
    return Fp8Rows(quantize_fp8_reference(x, form.scale), form.scale)


def empty_rows(shape: tuple[int, ...], device: torch.device, form: Fp8Form) -> Fp8Rows:
    """Memory for rows in ``form``; a calibrated scale is in it already."""
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if form.scale is not None:
        return Fp8Rows(codes, form.scale)
    return Fp8Rows(codes, torch.empty(shape[0], dtype=torch.float32, device=device))


@triton.jit
def to_fp8(x, scale):
    """Clamp and round a float32 block to e4m3; shared by every kernel that writes FP8."""
    x = x / scale
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def row_scale(x):
    """The scale of a row, from a float32 block of its values or of the largest of each place in its parts."""
    largest = tl.maximum(tl.max(tl.abs(x), 0), 448.0 * 2.0**-40)  # MIN_ROW_SCALE
    # A mantissa beyond that of 448 = 1.75 * 2**8 carries into the exponent; the rest of the mantissa goes.
    power = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
    return (power - (8 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def apply_scale(y, scale):
    """A block of ``ScaledRows`` as it is meant: ``y · scale`` in ``y``'s dtype."""
    return (y.to(tl.float32) * scale).to(y.dtype)


@triton.jit
def load_tiles(ptr, num_cols, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """``num_cols`` values from ``ptr`` on as ``TILES`` blocks, zeros behind the last."""
    tiles = ()
    for i in tl.static_range(TILES):
        cols = i * BLOCK + tl.arange(0, BLOCK)
        tiles = tiles + (tl.load(ptr + cols, mask=cols < num_cols, other=0.0),)
    return tiles


@triton.jit(do_not_specialize=("num_groups",))
def _quantize_kernel(x_ptr, scale_ptr, out_ptr, num_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    # Groups that are all there or not at all: the compiler then moves several values at a time.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_groups.to(tl.int64) * GROUP
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, to_fp8(x, tl.load(scale_ptr)), mask=mask)


@triton.jit
def _quantize_rowwise_kernel(x_ptr, out_ptr, scale_ptr, row_size, TILES: tl.constexpr, BLOCK: tl.constexpr):
    # The row in registers, in parts that waste no threads on a length that is no power of two.
    row = tl.program_id(0).to(tl.int64)
    tiles = load_tiles(x_ptr + row * row_size, row_size, TILES, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TILES):
        largest = tl.maximum(largest, tl.abs(tiles[i].to(tl.float32)))
    scale = row_scale(largest)
    tl.store(scale_ptr + row, scale)
    for i in tl.static_range(TILES):
        columns = i * BLOCK + tl.arange(0, BLOCK)
        codes = to_fp8(tiles[i].to(tl.float32), scale)
        tl.store(out_ptr + row * row_size + columns, codes, mask=columns < row_size)


def quantize_fp8_triton(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Launch ``quantize_fp8`` as one Triton kernel."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    block, num_warps = FLAT_TILE
    group = 1 if x.numel() % 16 else 16
    grid = (ceil_div(x.numel(), block),)
    _quantize_kernel[grid](x, scale, out, x.numel() // group, GROUP=group, BLOCK=block, num_warps=num_warps)
    return out


def quantize_fp8_rowwise_triton(x: torch.Tensor) -> Fp8Rows:
    """Launch ``quantize_fp8_rowwise`` as one Triton kernel, one program a row."""
    x = x.contiguous()
    rows, row_size = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(ROW_TILE.values, power_of_two_at_least(row_size, 128))
    _quantize_rowwise_kernel[(rows,)](
        x, out, scale, row_size, TILES=ceil_div(row_size, block), BLOCK=block, num_warps=ROW_TILE.warps
    )
    return Fp8Rows(out, scale)


AOT_SPECS = [
    (
        _quantize_kernel,
        {"x_ptr": "*bf16", "scale_ptr": "*fp32", "out_ptr": "*fp8e4nv", "num_groups": "i32"},
        {"GROUP": 16, "BLOCK": FLAT_TILE.values},
        {"num_warps": FLAT_TILE.warps},
    ),
    (
        _quantize_rowwise_kernel,
        {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "row_size": "i32"},
        {"TILES": 8, "BLOCK": ROW_TILE.values},
        {"num_warps": ROW_TILE.warps},
    ),
]
