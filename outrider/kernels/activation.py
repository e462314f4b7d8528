"""The gated activation of an MLP: ``silu(gate) * up``, written as FP8 when the next product wants it.

Called by dense and shared-expert MLPs; the kernels of experts compute it themselves, with ``swiglu_rounded``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.quantize import quantize_fp8_reference, to_fp8


def silu_mul(gate_up: torch.Tensor, fp8_scale: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` of ``gate_up [T, 2I]`` (gate is the first half) as ``[T, I]``.

    float32 inside, rounded once to the dtype of ``gate_up``. With ``fp8_scale`` (float32 scalar tensor) that
    rounded value is divided by the scale, clamped to +-448 and returned as float8_e4m3fn.
    """
    if on_gpu(gate_up):
        return silu_mul_triton(gate_up, fp8_scale)
    return silu_mul_reference(gate_up, fp8_scale)


def silu_mul_reference(gate_up: torch.Tensor, fp8_scale: torch.Tensor | None = None) -> torch.Tensor:
    """The contract of ``silu_mul`` in plain torch: the CPU path and the test oracle."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    y = (F.silu(gate) * up).to(gate_up.dtype)
    return y if fp8_scale is None else quantize_fp8_reference(y, fp8_scale)


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
    BLOCK: tl.constexpr,
):
    """One program writes ``BLOCK`` columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    gate = tl.load(gate_up_ptr + row * row_stride + cols, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * row_stride + num_cols + cols, mask=mask, other=0.0)
    y = swiglu_rounded(gate, up, gate.dtype)
    if HAS_FP8:
        tl.store(out_ptr + row * num_cols + cols, to_fp8(y.to(tl.float32), tl.load(scale_ptr)), mask=mask)
    else:
        tl.store(out_ptr + row * num_cols + cols, y, mask=mask)


def silu_mul_triton(gate_up: torch.Tensor, fp8_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Launch over rows and column blocks; see ``silu_mul``."""
    num_rows, width = gate_up.shape
    num_cols = width // 2
    dtype = gate_up.dtype if fp8_scale is None else torch.float8_e4m3fn
    out = torch.empty((num_rows, num_cols), dtype=dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    block = min(2048, power_of_two_at_least(num_cols, 32))
    _silu_mul_kernel[(num_rows, ceil_div(num_cols, block))](
        gate_up,
        out,
        fp8_scale,
        gate_up.stride(0),
        num_cols,
        HAS_FP8=fp8_scale is not None,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out


AOT_SPECS = [
    (
        _silu_mul_kernel,
        {
            "gate_up_ptr": "*bf16",
            "out_ptr": "*fp8e4nv",
            "scale_ptr": "*fp32",
            "row_stride": "i32",
            "num_cols": "i32",
        },
        {"HAS_FP8": True, "BLOCK": 2048},
    )
]
