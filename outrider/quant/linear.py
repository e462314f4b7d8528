"""Linear layers in each weight format. Built by ``models.layers``; they call kernels and nothing above.

A layer may stack several checkpoint matrices (q, k, v; gate, up) into one GEMM; each keeps its own scale.
Legend: T tokens, K in features, N out features, both of this rank; P stacked parts.
Sources: the tensors that ModelOpt exports for FP8 (static per-tensor W8A8) and for NVFP4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from outrider.kernels.gemm import fp8_linear, one_scale_is_faster
from outrider.kernels.nvfp4 import (
    BLOCK_SIZE,
    Nvfp4Path,
    fp8_rows_form,
    fp8_rows_linear,
    fp8_rows_unscaled,
    nvfp4_linear,
    nvfp4_path,
    nvfp4_to_fp8_rows,
)
from outrider.kernels.quantize import Fp8Form, Fp8Rows, Operand, Product, quantize_fp8
from outrider.kernels.w4a4 import DEPTH_MULTIPLE, Fp4Weight, w4a4_linear
from outrider.quant.base import Format, WeightBuilder, check_depth
from outrider.quant.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Part:
    """One stacked checkpoint matrix: module ``name`` of ``rows``; this rank holds ``length`` from ``start``."""

    name: str
    rows: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Columns:
    """The in features: ``total`` in the checkpoint, of which this rank holds ``length`` from ``start``."""

    total: int
    start: int
    length: int


class Linear(Protocol):
    """``y[T, N] = x[T, K] @ weight[N, K].T``."""

    def input_form(self, num_rows: int) -> Fp8Form | None:
        """The form that norms and activations may give ``num_rows`` rows of ``x``; None: the model dtype alone."""

    def __call__(self, x: Operand) -> torch.Tensor:
        """The product in the model dtype, of ``x`` in the model dtype or in ``input_form``."""

    def unscaled(self, x: Operand) -> Product:
        """The same for a reader that takes ``ScaledRows`` too, which is what it gets where that is faster."""


def build_linear(
    builder: WeightBuilder, parts: tuple[Part, ...], cols: Columns, bias: bool = False
) -> Linear:
    """The linear layer for the format that the checkpoint stores these parts in."""
    fmt = builder.format_of(*(f"{part.name}.weight" for part in parts))
    return _LAYERS[fmt](builder, parts, cols, bias)


class PlainLinear:
    """Weights in the model dtype."""

    def __init__(self, builder: WeightBuilder, parts: tuple[Part, ...], cols: Columns, bias: bool) -> None:
        self.matrix = Matrix(builder.empty(_num_rows(parts), cols.length))
        self.bias = _add_bias(builder, parts, cols) if bias else None
        _add_matrix(builder, "weight", parts, self.matrix.weight, cols, pack=1)
        builder.after_load.append(self.matrix.prepare)

    def input_form(self, num_rows: int) -> Fp8Form | None:
        """See ``Linear``."""
        return None

    def __call__(self, x: Operand) -> torch.Tensor:
        """See ``Linear``."""
        assert isinstance(x, torch.Tensor)
        y = self.matrix(x)
        return y if self.bias is None else y + self.bias

    def unscaled(self, x: Operand) -> Product:
        """See ``Linear``."""
        return self(x)


class Fp8Linear:
    """e4m3 weights with one scale per part (exact, never merged); activations e4m3 with a static scale."""

    def __init__(self, builder: WeightBuilder, parts: tuple[Part, ...], cols: Columns, bias: bool) -> None:
        self.out_dtype = builder.dtype
        self.weight = builder.empty(_num_rows(parts), cols.length, dtype=torch.float8_e4m3fn)
        self.weight_scale = builder.empty(_num_rows(parts), dtype=torch.float32)
        self.product_scale = builder.empty(_num_rows(parts), dtype=torch.float32)
        self.scale = builder.empty(dtype=torch.float32)
        self.one_scale: torch.Tensor | None = None
        self.bias = _add_bias(builder, parts, cols) if bias else None
        _add_matrix(builder, "weight", parts, self.weight, cols, pack=1)
        part_scales = _add_scalars(builder, "weight_scale", parts)
        input_scales = _add_scalars(builder, "input_scale", parts)

        def finish() -> None:
            for out, scale in zip(_split(self.weight_scale, parts), part_scales, strict=True):
                out.copy_(scale)
            # The parts see one input, so the exporter gives them one scale; the largest never saturates.
            self.scale.copy_(input_scales.max())
            torch.mul(self.weight_scale, self.scale, out=self.product_scale)
            is_one = bool((part_scales == part_scales[0]).all())
            self.one_scale = self.product_scale[:1] if is_one else None

        builder.after_load.append(finish)

    def input_form(self, num_rows: int) -> Fp8Form | None:
        """See ``Linear``."""
        return Fp8Form(self.scale)

    def __call__(self, x: Operand) -> torch.Tensor:
        """See ``Linear``."""
        codes = x.codes if isinstance(x, Fp8Rows) else quantize_fp8(x, self.scale)
        y = fp8_linear(codes, self.weight, None, self.product_scale, self.out_dtype, self.one_scale)
        return y if self.bias is None else y + self.bias

    def unscaled(self, x: Operand) -> Product:
        """See ``Linear``."""
        return self(x)


class Nvfp4Linear:
    """e2m1 weights packed two a byte along K, e4m3 scales per 16 of K, an f32 scale.

    ``nvfp4_path`` of the device decides: activations become four bits too with the calibrated scale, or stay wide;
    on a GPU with FP8 but no FP4 tensor cores the loaded weights become e4m3 rows.
    """

    def __init__(self, builder: WeightBuilder, parts: tuple[Part, ...], cols: Columns, bias: bool) -> None:
        num_rows = _num_rows(parts)
        self.out_dtype = builder.dtype
        self.packed = builder.empty(num_rows, cols.length // 2, dtype=torch.uint8)
        self.block_scale = builder.empty(num_rows, cols.length // BLOCK_SIZE, dtype=torch.float8_e4m3fn)
        self.bias = _add_bias(builder, parts, cols) if bias else None
        _add_matrix(builder, "weight", parts, self.packed, cols, pack=2)
        _add_matrix(builder, "weight_scale", parts, self.block_scale, cols, pack=BLOCK_SIZE)
        part_scales = _add_scalars(builder, "weight_scale_2", parts)
        input_scales = _add_scalars(builder, "input_scale", parts)
        # (packed, block scale, scale) of each GEMM: one, unless an exporter gave the parts different scales.
        self.gemms = [(self.packed, self.block_scale, part_scales[0])]
        self.fp8_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.can_leave_scales = False
        self.fp4: list[Fp4Weight] = []

        def finish() -> None:
            if not bool((part_scales == part_scales[0]).all()):
                pieces = _split(self.packed, parts), _split(self.block_scale, parts), part_scales.unbind()
                self.gemms = list(zip(*pieces, strict=True))
            path = nvfp4_path(builder.device)
            if path is Nvfp4Path.FP8:
                self._become_fp8_rows()
            elif path is Nvfp4Path.W4A4:
                check_depth(f"{parts[0].name}.weight", cols.length, DEPTH_MULTIPLE)
                self.fp4 = [Fp4Weight(*weight, input_scales.max()) for weight in self.gemms]

        builder.after_load.append(finish)

    def _become_fp8_rows(self) -> None:
        """Replace the packed weights by ``(e4m3 [N, K], scale f32 [N])``."""
        # Unscaled values may be beyond float16, and a bias is added to scaled ones.
        self.can_leave_scales = len(self.gemms) == 1 and self.bias is None and self.out_dtype != torch.float16
        scales = [scale.reshape(1).expand(packed.shape[0]) for packed, _, scale in self.gemms]
        self.fp8_rows = nvfp4_to_fp8_rows(self.packed, self.block_scale, torch.cat(scales))
        self.gemms.clear()
        del self.packed, self.block_scale

    def input_form(self, num_rows: int) -> Fp8Form | None:
        """See ``Linear``."""
        return None if self.fp8_rows is None else fp8_rows_form(num_rows, self.fp8_rows[0])

    def __call__(self, x: Operand) -> torch.Tensor:
        """See ``Linear``."""
        if self.fp8_rows is not None:
            y = fp8_rows_linear(x, *self.fp8_rows, self.out_dtype)
            return y if self.bias is None else y + self.bias
        assert isinstance(x, torch.Tensor)
        if self.fp4:
            outs = [w4a4_linear(x, weight) for weight in self.fp4]
        else:
            outs = [nvfp4_linear(x, *weight) for weight in self.gemms]
        y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if self.bias is None else y + self.bias

    def unscaled(self, x: Operand) -> Product:
        """See ``Linear``."""
        rows = self.fp8_rows
        if rows is None or not self.can_leave_scales or not one_scale_is_faster(x.shape[0], rows[0]):
            return self(x)
        return fp8_rows_unscaled(x, *rows, self.out_dtype)


_LAYERS: dict[Format, type[PlainLinear] | type[Fp8Linear] | type[Nvfp4Linear]] = {
    Format.PLAIN: PlainLinear,
    Format.FP8: Fp8Linear,
    Format.NVFP4: Nvfp4Linear,
}


def _num_rows(parts: tuple[Part, ...]) -> int:
    return sum(part.length for part in parts)


def _split(stacked: torch.Tensor, parts: tuple[Part, ...]) -> tuple[torch.Tensor, ...]:
    """The parts' rows of a stacked tensor, as views."""
    return torch.split(stacked, [part.length for part in parts])


def _add_matrix(
    builder: WeightBuilder, suffix: str, parts: tuple[Part, ...], dest: torch.Tensor, cols: Columns, pack: int
) -> None:
    """Slots of the stacked matrices ``<part>.<suffix>``, where one column stands for ``pack`` in features."""
    columns = slice(cols.start // pack, (cols.start + cols.length) // pack)
    for part, rows in zip(parts, _split(dest, parts), strict=True):
        select = (slice(part.start, part.start + part.length), columns)
        builder.add_slot(f"{part.name}.{suffix}", (part.rows, cols.total // pack), rows, select)


def _add_scalars(builder: WeightBuilder, suffix: str, parts: tuple[Part, ...]) -> torch.Tensor:
    """f32 ``[P]`` of the parts' one-element tensors ``<part>.<suffix>``."""
    dest = builder.empty(len(parts), dtype=torch.float32)
    for part, scalar in zip(parts, dest.unbind(), strict=True):
        builder.add_slot(f"{part.name}.{suffix}", (), scalar)
    return dest


def _add_bias(builder: WeightBuilder, parts: tuple[Part, ...], cols: Columns) -> torch.Tensor | None:
    """The stacked biases. Where ranks split the in features their outputs are summed: one rank adds the bias."""
    if cols.start:
        builder.unused_prefixes += [f"{part.name}.bias" for part in parts]
        return None
    dest = builder.empty(_num_rows(parts))
    for part, rows in zip(parts, _split(dest, parts), strict=True):
        builder.add_slot(
            f"{part.name}.bias", (part.rows,), rows, (slice(part.start, part.start + part.length),)
        )
    return dest
