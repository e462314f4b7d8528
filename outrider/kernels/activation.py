"""The gated activation of an MLP: ``silu(gate) * up``, written as FP8 when the next product wants it.

Called by dense and shared-expert MLPs; the kernels of experts compute it themselves, with ``swiglu_rounded``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.quantize import Fp8Form, Operand, empty_rows, quantize_rows_reference, row_scale, to_fp8


def _tile(num_cols: int, per_row: bool) -> tuple[int, int]:
    """Columns of a program and its warps: the whole row where that has a scale of its own.

    H200, 2026-11-26, 400 / 1,315 / 8,192 rows of 8,192: with a scale a row 8.1 / 18.9 / 89.5 us, in 8 warps 8.4 / 19.9
    / 89.0; with a given scale 6.4 / 16.6 / 86.3, with 1,024 columns in 4 warps 6.5 / 15.8 / 86.4, with 4,096 in 8 warps
    7.6 / 17.6 / 83.5: benchmarks/results/trials_h200.txt
    """
    block = power_of_two_at_least(num_cols, 32)
    if per_row:
        return block, max(1, min(16, block // 512))
    block = min(2048, block)
    return block, max(1, block // 256)


def silu_mul(gate_up: torch.Tensor, form: Fp8Form | None = None) -> Operand:
    """``silu(gate) * up`` of ``gate_up [T, 2I]`` (gate is the first half): ``[T, I]`` as the next product wants it.

    float32 inside, rounded once to the dtype of ``gate_up``, before it takes ``form``.
    """
    return silu_mul_triton(gate_up, form) if on_gpu(gate_up) else silu_mul_reference(gate_up, form)


def silu_mul_reference(gate_up: torch.Tensor, form: Fp8Form | None = None) -> Operand:
    """The contract of ``silu_mul`` in plain torch: the CPU path and the test oracle."""
    y = swiglu(gate_up)
    return y if form is None else quantize_rows_reference(y, form)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[R, 2I]`` in the model dtype alone; the references of experts call it too."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def swiglu_rounded(gate, up, DTYPE: tl.constexpr):
    """``silu(gate) * up`` in ``DTYPE`` of two products, each rounded to it first: as the separate operations round."""
    gate = gate.to(DTYPE).to(tl.float32)
    return (gate * tl.sigmoid(gate) * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    row_stride,
    num_cols,
    HAS_FP8: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes ``BLOCK`` columns of one row; all of them where they share a scale of their own."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    gate = tl.load(gate_up_ptr + row * row_stride + cols, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * row_stride + num_cols + cols, mask=mask, other=0.0)
    y = swiglu_rounded(gate, up, gate.dtype)
    if HAS_FP8:
        y = y.to(tl.float32)
        if PER_ROW:
            scale = row_scale(y)
            tl.store(scale_ptr + row, scale)
        else:
            scale = tl.load(scale_ptr)
        y = to_fp8(y, scale)
    tl.store(out_ptr + row * num_cols + cols, y, mask=mask)


def silu_mul_triton(gate_up: torch.Tensor, form: Fp8Form | None = None) -> Operand:
    """Launch over rows and column blocks; see ``silu_mul``."""
    num_rows, width = gate_up.shape
    num_cols = width // 2
    shape, device = (num_rows, num_cols), gate_up.device
    fp8 = None if form is None else empty_rows(shape, device, form)
    out = torch.empty(shape, dtype=gate_up.dtype, device=device) if fp8 is None else fp8.codes
    per_row = form is not None and form.scale is None
    block, num_warps = _tile(num_cols, per_row)
    if num_rows:
        _silu_mul_kernel[(num_rows, ceil_div(num_cols, block))](
            gate_up,
            out,
            None if fp8 is None else fp8.scale,
            gate_up.stride(0),
            num_cols,
            HAS_FP8=fp8 is not None,
            PER_ROW=per_row,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out if fp8 is None else fp8


_SIGNATURE = {
    "gate_up_ptr": "*bf16",
    "out_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
    "row_stride": "i32",
    "num_cols": "i32",
}


def _aot_spec(per_row: bool):
    block, num_warps = _tile(8192, per_row)
    constants = {"HAS_FP8": True, "PER_ROW": per_row, "BLOCK": block}
    return _silu_mul_kernel, _SIGNATURE, constants, {"num_warps": num_warps}


AOT_SPECS = [_aot_spec(False), _aot_spec(True)]
